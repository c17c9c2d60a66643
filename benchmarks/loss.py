"""Loss of a short training run, dense against ``--sla``, on text that every machine has.

    python -m benchmarks.loss --model gpt2-124m --context 1024 --iterations 150    # one GPU, about two minutes
    python -m benchmarks.loss --model quickstart --device cpu

Each variant is trained by Megatron's own trainer through the entry point, one after the other on one rank: the same
seed, the same batches, no checkpoint.  The text is Python's own sources, as in the quickstart, tokenized by
``sla-data``.  One seed and few tokens: whether it trains, and whether losses are close; ``sla-sweep`` compares
settings.  Speed is measured by ``throughput``, in turns.  ``benchmarks.loss_logs`` makes the same result of the logs of
runs that were made elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart import build_dataset, launch
from examples.quickstart import flags as quickstart
from examples.quickstart.corpus import CorpusError
from examples.quickstart.training_log import Records, summarise
from sla_megatron.common.errors import StartError, one_line_errors
from sla_megatron.common.flag_types import count, number
from sla_megatron.common.presets import preset_flags
from sla_megatron.cpu.device import add_device_arg, choose_device

from .record import Table, add_output_args, check_output, save_figure, write_result
from .training_steps import VARIANTS

NAME = "loss"

#: The quickstart's own model; its context is the default.
QUICKSTART = "quickstart"


@dataclass(frozen=True)
class Run:
    """What all variants have in common.

    Attributes:
        flags: Megatron's, of model, data and training.
        tokens: of an iteration.
    """

    flags: list[str]
    tokens: int


def main() -> None:
    """Train every variant, and write ``--out``."""
    parser = make_parser()
    with one_line_errors():
        args = parser.parse_args()
    check_output(parser, args)
    with one_line_errors():
        device = choose_device(args.device)
        try:
            model = [] if args.model == QUICKSTART else preset_flags(args.model.replace("+", " "))
        except StartError as error:
            reason = f"expected {QUICKSTART}, or presets with + between them ({error.reason})"
            parser.error(f"--model {args.model}: {reason}")
    with tempfile.TemporaryDirectory(prefix="sla-loss-") as folder:
        try:
            rows = measure(args, list(model), device, Path(folder))
        except (launch.TrainingFailed, CorpusError) as error:
            sys.exit(f"benchmarks.loss: error: {error}")
    write_result(args, NAME, device_name(device), rows, tables, plot)


def make_parser() -> argparse.ArgumentParser:
    """Of the command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=QUICKSTART, metavar="NAME", help=f"{QUICKSTART} (default), or presets")
    parser.add_argument("--context", type=count("--context", 2), metavar="TOKENS", help="default: 128")
    parser.add_argument("--variants", nargs="+", default=["dense", "full"], choices=VARIANTS, help="beside dense")
    for name, default, what in (
        ("iterations", 160, "of training"),
        ("micro-batch-size", 8, "samples"),
        ("global-batch-size", 16, "samples of an iteration"),
        ("eval-iters", 10, "batches of validation, at the end"),
        ("vocab-size", 4096, "tokens"),
        ("seed", 1234, "of weights and of the order of samples"),
    ):
        flag = f"--{name}"
        parser.add_argument(flag, type=count(flag), default=default, metavar="N", help=f"{what} (default: {default})")
    size = number("--corpus-mb", float, "a number of megabytes, 1 or more", 1)
    parser.add_argument("--corpus-mb", type=size, default=8.0, metavar="MB", help="text (default: 8 MB)")
    parser.add_argument("--core-attention", default="sdpa", choices=("megatron", "sdpa"))
    parser.add_argument("--flags", default="", help="more of Megatron's flags, in one word, for every variant")
    return add_output_args(add_device_arg(parser), NAME)


def measure(args: argparse.Namespace, model: list[str], device: str, folder: Path) -> list[dict[str, Any]]:
    """Make the data in ``folder`` and train there; a row for each variant.

    Raises :class:`TrainingFailed` with the end of a run's log, or :class:`CorpusError`.
    """
    dataset = build_dataset.build(folder / "data", int(args.corpus_mb * 1e6), args.vocab_size)
    run = run_of(args, model, device, dataset, folder)
    rows: list[dict[str, Any]] = []
    for variant in dict.fromkeys(["dense", *args.variants]):
        records = launch.train(variant, 1, [*run.flags, *VARIANTS[variant]], folder / f"{variant}.log")
        try:
            rows.append(row_of(args, run, variant, records))
        except ValueError as error:
            raise launch.TrainingFailed(f"{variant}: training ended, but {error}") from None
    return rows


def run_of(
    args: argparse.Namespace, model: list[str], device: str, dataset: build_dataset.Dataset, folder: Path
) -> Run:
    """The flags of every variant; what comes later counts, so that presets keep what is not asked for here."""
    context = args.context or quickstart.SEQ_LENGTH
    values = {
        "--seq-length": context,
        "--max-position-embeddings": context,
        "--micro-batch-size": args.micro_batch_size,
        "--global-batch-size": args.global_batch_size,
        "--train-iters": args.iterations,
        # Once, at the end.
        "--eval-interval": args.iterations + 1,
        "--eval-iters": args.eval_iters,
        "--log-interval": max(1, args.iterations // 20),
        "--seed": args.seed,
        "--tokenizer-type": "SentencePieceTokenizer",
        "--tokenizer-model": dataset.tokenizer_model,
        "--data-path": dataset.prefix,
        "--data-cache-path": folder / "cache",
        "--split": "95,5,0",
        "--transformer-impl": "local",
        "--core-attention": args.core_attention,
        "--device": device,
    }
    if model:
        # A preset's warm-up is that of a long run.
        values["--lr-warmup-iters"] = max(1, args.iterations // 10)
    else:
        model = [*quickstart.MODEL.split(), *quickstart.TRAINING.split()]
    flags = [*model, *(str(word) for flag in values.items() for word in flag), *args.flags.split()]
    return Run(flags, context * args.global_batch_size)


def row_of(args: argparse.Namespace, run: Run, variant: str, records: Records) -> dict[str, Any]:
    """What the log of a run that ended says.  Raises :class:`ValueError` naming what it lacks."""
    result = summarise(records, run.tokens)
    return {
        "model": args.model,
        "context": run.tokens // args.global_batch_size,
        "variant": variant,
        "seed": args.seed,
        "iterations": result.iteration,
        "tokens": result.iteration * run.tokens,
        "parameters": result.parameters,
        "train_losses": [[step.iteration, step.loss] for step in records.steps],
        "validation_loss": result.validation_loss,
    }


def device_name(device: str) -> str:
    """The GPU's, or ``cpu``."""
    if device == "cpu":
        return device
    import torch

    return torch.cuda.get_device_name()


def tables(result: dict[str, Any]) -> list[Table]:
    """One line a variant."""
    header = ("model", "context", "attention", "parameters", "tokens", "train loss", "validation loss", "less dense")
    dense = next(row for row in result["rows"] if row["variant"] == "dense")
    cells = [
        (
            row["model"],
            str(row["context"]),
            row["variant"],
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['tokens']:,}",
            f"{row['train_losses'][-1][1]:.4f}",
            f"{row['validation_loss']:.4f}",
            "" if row is dense else f"{row['validation_loss'] - dense['validation_loss']:+.4f}",
        )
        for row in result["rows"]
    ]
    note = (
        "Nats a token, one run of each, all from one seed: no spread, and no interval. Train loss: the mean since the "
        "log's line before."
    )
    return [Table("Loss of a short run", header, cells, left=(0, 2), note=note)]


def plot(result: dict[str, Any], path: Path) -> None:
    """Training loss against iterations."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3.4))
    for row in result["rows"]:
        axis.plot(*zip(*row["train_losses"], strict=True), label=row["variant"])
    axis.set(xlabel="iteration", ylabel="training loss, nats a token", title=row["model"])
    axis.legend()
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
