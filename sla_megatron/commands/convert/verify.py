"""Do both sides compute the same?  Logits of random tokens, from Megatron's model and from the Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .architecture import argv_from_config
from .errors import ConvertError
from .megatron_model import args_of, build, fill, megatron_alone
from .megatron_writer import vocabulary_rows
from .source import Source

#: Relative error in the 2-norm up to which fp32 logits count as equal: rounding, in sums of another order.
THRESHOLD = 1e-5


@dataclass(frozen=True)
class Comparison:
    """How far the logits of two models are apart.

    Attributes:
        relative: the 2-norm of the difference over the 2-norm of Megatron's logits.
        largest: the largest difference of any logit.
    """

    relative: float
    largest: float


def compare(source: Source, folder: Path, num_sequences: int = 2, seed: int = 1) -> Comparison:
    """Megatron's logits of ``source`` against those of the model in ``folder``, both in fp32, on random tokens."""
    length = min(source.config["max_position_embeddings"], 64)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(source.config["vocab_size"], (num_sequences, length), generator=generator)
    with megatron_model(source) as logits:
        expected = logits(tokens).clone()
    found = hf_logits(folder, tokens)
    if expected.shape != found.shape:
        raise ConvertError(f"{folder}: logits of shape {tuple(found.shape)}, Megatron's are {tuple(expected.shape)}")
    difference = found.double() - expected.double()
    return Comparison(float(difference.norm() / expected.double().norm()), float(difference.abs().max()))


@contextmanager
def megatron_model(source: Source) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the block, Megatron's own model of ``source`` in fp32, as a function of tokens ``[b, s]``.

    Its result is the logits ``[b, s, vocabulary]``, without padded rows.
    """
    with megatron_alone(), torch.no_grad():
        size = source.config["vocab_size"]
        flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size)]
        args = args_of([*argv_from_config(source.config), *flags], torch.float32)
        args.padded_vocab_size = vocabulary_rows(source)
        model = build(args)
        fill(model, source, args.padded_vocab_size)

        def logits(tokens: Tensor) -> Tensor:
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            return model(tokens, positions, None)[..., :size]

        yield logits


def hf_logits(folder: Path, tokens: Tensor) -> Tensor:
    """``[b, s, vocabulary]`` for tokens ``[b, s]``, from the model in ``folder`` in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(tokens).logits
