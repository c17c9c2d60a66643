"""Do both sides compute the same?  Logits of random tokens, from the model that was trained and from the export."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .architecture import MODEL_TYPE
from .errors import ConvertError
from .megatron_model import megatron_alone
from .megatron_reader import MegatronSource
from .trained_model import trained_model
from .weight_files import read_json

#: Relative error in the 2-norm up to which fp32 logits count as equal: rounding, in sums of another order.
THRESHOLD = 1e-5

#: Tokens of the longest text.  Megatron's attention on a CPU holds scores of each pair of them, of all heads.
LONGEST = 1024

#: Tokens of each of the others.
SHORT = 64


@dataclass(frozen=True)
class Comparison:
    """How far the logits of two models are apart.

    Attributes:
        relative: the 2-norm of the difference over the 2-norm of Megatron's logits.
        largest: the largest difference of any logit.
    """

    relative: float
    largest: float


def compare(source: MegatronSource, folder: Path, num_sequences: int = 2, seed: int = 1) -> Comparison:
    """Logits of the checkpoint ``source``'s model against those of the model in ``folder``, in fp32, on random tokens.

    Each is built from what lies in its own folder, Megatron's by Megatron (``trained_model.py``).  The texts' largest
    differences count.

    Raises:
        ConvertError: where one of them cannot be built, or the folder's has no row for a token that is trained.
    """
    size = source.config["vocab_size"]
    # Rows beyond the tokens are padding, on either side.
    common = min(size, _hf_config(folder).vocab_size)
    is_learned = source.args.position_embedding_type == "learned_absolute"
    # One model at a time: either may fill the memory.
    with megatron_model(source) as logits:
        made = _texts(common, source.args.max_position_embeddings, is_learned, num_sequences, seed)
        texts = [(*text, logits(*text)) for text in made]
    if any(expected[..., common:].any() for *_, expected in texts):
        raise ConvertError(f"{folder}: a vocabulary of {common}; the checkpoint has weights for {size} tokens")
    with _hf_model(folder) as logits:
        return _furthest((logits(tokens, start)[..., :common], theirs[..., :common]) for tokens, start, theirs in texts)


def compare_exports(folder: Path, out: Path, num_sequences: int = 2, seed: int = 1) -> Comparison:
    """Likewise, of two folders of the same vocabulary: ``out``'s against ``folder``'s."""
    config = _hf_config(folder)
    is_learned = config.position_embedding_type == "learned_absolute"
    made = _texts(config.vocab_size, config.max_position_embeddings, is_learned, num_sequences, seed)
    with _hf_model(folder) as logits:
        texts = [(*text, logits(*text)) for text in made]
    with _hf_model(out) as logits:
        return _furthest((logits(tokens, start), expected) for tokens, start, expected in texts)


def _furthest(pairs: Iterable[tuple[Tensor, Tensor]]) -> Comparison:
    """Of found and expected logits, those that are furthest apart."""
    found: list[Comparison] = []
    for actual, expected in pairs:
        difference = actual.double() - expected.double()
        found.append(Comparison(float(difference.norm() / expected.double().norm()), float(difference.abs().max())))
    # What is not a number is neither larger nor smaller than one.
    return max(found, key=lambda one: math.inf if math.isnan(one.relative) else one.relative)


def _texts(vocabulary: int, whole: int, is_learned: bool, count: int, seed: int) -> Iterator[tuple[Tensor, int]]:
    """Tokens ``[b, s]`` and the position of the first, of a model with ``whole`` positions.

    Short ones, one as long as the model takes, up to ``LONGEST``, and one that ends at the last learned position.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(number: int, length: int) -> Tensor:
        return torch.randint(vocabulary, (number, length), generator=generator)

    yield tokens(count, min(whole, SHORT)), 0
    if whole > SHORT:
        yield tokens(1, min(whole, LONGEST)), 0
    if whole > LONGEST and is_learned:
        yield tokens(1, SHORT), whole - SHORT


#: The logits ``[b, s, vocabulary]`` of tokens ``[b, s]``, whose first is at this position.
Logits = Callable[..., Tensor]


@contextmanager
def megatron_model(source: MegatronSource) -> Iterator[Logits]:
    """Within the block, the trained model of ``source`` in fp32, as a function of tokens ``[b, s]``.

    Its result is the logits ``[b, s, vocabulary]``, without padded rows.  A second argument is the position of the
    first token; Megatron's rotary positions always begin at 0.
    """
    with megatron_alone(), torch.no_grad():
        model = trained_model(source)

        def logits(tokens: Tensor, start: int = 0) -> Tensor:
            try:
                found = model(tokens, _positions(tokens, start), None)
            except Exception as error:
                raise ConvertError(f"{source.path}: Megatron's model does not run on a CPU: {error}") from error
            return found[..., : source.config["vocab_size"]].clone()

        yield logits


@contextmanager
def _hf_model(folder: Path) -> Iterator[Logits]:
    """The same of the model in ``folder``, with all its rows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **_trust(folder)).eval()

    def logits(tokens: Tensor, start: int) -> Tensor:
        # Left out where a user would leave it out: what the model makes of that is compared, too.
        return model(tokens, position_ids=_positions(tokens, start) if start else None).logits

    with torch.no_grad():
        yield logits


def _hf_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, **_trust(folder))


def _trust(folder: Path) -> dict[str, bool]:
    """A folder of another architecture has to work without its own code, as everywhere."""
    return {"trust_remote_code": read_json(folder / "config.json").get("model_type") == MODEL_TYPE}


def _positions(tokens: Tensor, start: int) -> Tensor:
    return torch.arange(start, start + tokens.shape[1]).expand_as(tokens)
