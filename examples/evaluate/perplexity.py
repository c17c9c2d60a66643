"""Perplexity of a text file under an exported model, and under the Megatron checkpoint that it was exported from.

    python examples/evaluate/perplexity.py text.txt --hf exported
    python examples/evaluate/perplexity.py text.txt --hf exported --megatron checkpoints

The text's tokens are cut into windows of max_position_embeddings that do not overlap.  In each window every token but
the first is predicted from those before it, once.  Everything is computed in fp32.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    #: Tokens ``[b, s]`` to logits ``[b, s, vocabulary]``.
    Logits = Callable[[Tensor], Tensor]

#: Relative difference of two mean losses up to which they count as equal.  Rounding is far below it.
THRESHOLD = 1e-5


class EvaluationError(Exception):
    """What cannot be evaluated, in one line."""


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 1 if Megatron's loss is another one; 2, after one line on stderr, for what cannot be evaluated."""
    args = parse_args(argv)
    try:
        return evaluate(args)
    except EvaluationError as error:
        print(f"perplexity: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="perplexity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, metavar="TEXTFILE", help="UTF-8")
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="what sla-convert megatron-to-hf wrote")
    parser.add_argument("--megatron", type=Path, metavar="CHECKPOINT", help="compare with its loss, on the CPU")
    parser.add_argument("--device", help="of the exported model, such as cpu; default: a GPU where there is one")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="windows at a time; default: %(default)s"
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: expected an integer from 1")
    return args


def evaluate(args: argparse.Namespace) -> int:
    """Compute and print; returns the exit status.

    Raises:
        EvaluationError: for a file or folder that does not serve.
    """
    text = read_text(args.text)
    if not (args.hf / "config.json").is_file():
        raise EvaluationError(f"{args.hf}: no config.json; expected what sla-convert megatron-to-hf wrote")
    if args.megatron is not None and not args.megatron.is_dir():
        raise EvaluationError(f"{args.megatron}: no such checkpoint folder")
    tokens = tokenize(args.hf, text)
    # The model is gone when this returns, before Megatron's takes as much memory.
    loss, batches, vocab_size = exported_loss(args.hf, tokens, args.batch_size, args.device)

    num_bytes, length = len(text.encode()), batches[0].shape[1]
    # The first tokens of windows are not predicted: they count as the mean of the others.
    bits = loss / math.log(2) * len(tokens) / num_bytes
    predicted = num_predicted(batches)
    print(f"{args.text}: {num_bytes} bytes, {len(tokens)} tokens, {predicted} predicted in windows of {length}")
    print(f"{args.hf}: loss {loss:.8f}, perplexity {math.exp(loss):.6g}, bits per byte {bits:.6f}", flush=True)
    return 0 if args.megatron is None else compare(args.megatron, batches, vocab_size, loss)


def exported_loss(
    folder: Path, tokens: Tensor, batch_size: int, device: str | None = None
) -> tuple[float, list[Tensor], int]:
    """Mean loss of the model in ``folder``, the windows that it is of, and the size of the model's vocabulary."""
    model = load_model(folder, device)
    size, highest = model.config.vocab_size, int(tokens.max())
    if highest >= size:
        raise EvaluationError(f"{folder}: the tokenizer made token {highest}, the model's are below {size}")
    batches = windows(tokens, model.config.max_position_embeddings, batch_size)
    loss = mean_loss(lambda ids: model(ids.to(model.device), use_cache=False).logits, batches, str(folder))
    return loss, batches, size


def compare(checkpoint: Path, batches: list[Tensor], vocab_size: int, loss: float) -> int:
    """Print Megatron's loss of the same windows and how far ``loss`` is from it; returns the exit status."""
    with megatron_logits(checkpoint, vocab_size, batches[0].shape[1]) as logits:
        expected = mean_loss(logits, batches, str(checkpoint))
    relative = abs(loss - expected) / expected
    verdict = "equal" if relative <= THRESHOLD else f"NOT equal (threshold {THRESHOLD:g})"
    print(f"{checkpoint}: loss {expected:.8f}, perplexity {math.exp(expected):.6g}, by Megatron")
    print(f"losses {verdict}: difference {loss - expected:.2e}, relative {relative:.2e}")
    return 0 if relative <= THRESHOLD else 1


# Text to windows.


def read_text(path: Path) -> str:
    """A UTF-8 file as it is, line ends included."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 at byte {error.start}") from error
    if not text:
        raise EvaluationError(f"{path}: the file is empty")
    return text


def tokenize(folder: Path, text: str) -> Tensor:
    """All token ids, by the tokenizer in ``folder``; none are added, as Megatron's data has none at the start."""
    import torch
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise EvaluationError(
            f"{folder}: no tokenizer; a checkpoint of NullTokenizer has none: save one into the folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    # Broken files and tokenizers of other kinds: many kinds of errors, of several libraries.
    except Exception as error:
        raise EvaluationError(f"{folder}: its tokenizer does not load: {one_line(error)}") from error
    # sentencepiece, in pretraining, found no special token in a text: a document that mentions </s> does not end there.
    how = {"split_special_tokens": True} if (folder / "tokenizer.model").is_file() else {}
    # verbose: a text longer than the model's window is what this is for.
    ids = tokenizer(text, add_special_tokens=False, verbose=False, **how)["input_ids"]
    if len(ids) < 2:
        raise EvaluationError(f"the text has {len(ids)} tokens: expected at least 2")
    return torch.tensor(ids)


def windows(tokens: Tensor, length: int, batch_size: int = 1) -> list[Tensor]:
    """``[b, length]`` tokens each; the rest, if it is shorter, at the end by itself.

    A rest of one token is left out: there is nothing to predict in it.
    """
    whole = len(tokens) // length * length
    batches = list(tokens[:whole].view(-1, length).split(batch_size)) if whole else []
    rest = tokens[whole:]
    return [*batches, rest[None]] if len(rest) > 1 else batches


def num_predicted(batches: list[Tensor]) -> int:
    """How many tokens are predicted: all but one of each window."""
    return sum(batch[:, 1:].numel() for batch in batches)


def mean_loss(logits_of: Logits, batches: list[Tensor], name: str) -> float:
    """Mean cross entropy in nats a predicted token; a progress bar on a terminal, called ``name``."""
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    total, predicted = 0.0, num_predicted(batches)
    with torch.no_grad(), tqdm(total=predicted, desc=name, unit="tok", disable=None) as bar:
        for tokens in batches:
            logits, targets = logits_of(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
            total += losses.double().sum().item()
            bar.update(len(targets))
    return total / predicted


# Models.


def load_model(folder: Path, device: str | None = None) -> Any:
    """The exported model, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        model = model.to(device).eval()
    # Broken files, other architectures, devices that are not there: many kinds, of several libraries.
    except Exception as error:
        raise EvaluationError(f"{folder}: {one_line(error)}") from error
    if found["missing_keys"]:
        # transformers only warns, and leaves them random.
        raise EvaluationError(f"{folder}: tensor {min(found['missing_keys'])} is missing")
    return model


@contextmanager
def megatron_logits(checkpoint: Path, vocab_size: int, length: int) -> Iterator[Logits]:
    """Megatron's own model of a checkpoint, in this process, on the CPU; its padded vocabulary rows are cut.

    Args:
        checkpoint: the ``--save`` folder, or one iteration of it.
        vocab_size: rows of the vocabulary that are not padding.
        length: the longest window.
    """
    from sla_megatron.commands.convert.commands import stored_args
    from sla_megatron.commands.convert.errors import ConvertError
    from sla_megatron.commands.convert.megatron_reader import MegatronSource, checkpoint_folder
    from sla_megatron.commands.convert.verify import megatron_model
    from sla_megatron.common.errors import FlagError

    try:
        folder = checkpoint_folder(checkpoint)
        # The vocabulary's size is the export's, so that the tokenizer that the run had need not be here.
        source = MegatronSource(folder, stored_args(folder), vocab_size)
        if source.config["max_position_embeddings"] < length:
            most = source.config["max_position_embeddings"]
            raise EvaluationError(f"{folder}: --max-position-embeddings {most}, the exported model has {length}")
        with megatron_model(source) as logits:
            yield logits
    except (ConvertError, FlagError) as error:
        raise EvaluationError(str(error)) from error


def one_line(error: Exception) -> str:
    """The first line of an error's message; its kind, if there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
