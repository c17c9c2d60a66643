"""The quickstart's options: what they may be, what follows from them, and how long it will take.

Nothing here imports torch before it has to: the first words come at once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from examples.quickstart import flags, workdir
from examples.quickstart.build_dataset import TEXTS
from sla_megatron.attention.sla_config import KV_PROJECTIONS, SHARES
from sla_megatron.common.errors import flag_of
from sla_megatron.common.flag_types import OneLineParser
from sla_megatron.flags.skipping import SLA_SETTINGS

#: Measured on two cores that had nothing else to do, in seconds: an iteration with its share of validation and
#: checkpoints; data, the starts of processes and the export; and reading prose, which is looked for in every docstring.
ITERATION_SECONDS, OTHER_SECONDS, PROSE_SECONDS = 0.65, 80, 60


def parse_args(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """Options, with `megatron` (what follows `--`). One line and exit code 2 for what cannot be accepted."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = OneLineParser(
        prog="quickstart", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier quickstart left in --out")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: GPUs if there are any")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor-parallel ranks; default: 2, or 1 on a single GPU")
    parser.add_argument(
        "--text",
        choices=tuple(TEXTS),
        default="code",
        help="what is read: Python's own sources (default), or what installed packages say of themselves",
    )
    size = parser.add_argument_group("size")
    size.add_argument("--train-iters", type=int, default=160, metavar="N", help="default: %(default)s")
    size.add_argument("--eval-iters", type=int, default=10, metavar="N", help="batches; default: %(default)s")
    size.add_argument("--corpus-mb", type=float, default=8.0, metavar="MB", help="text; default: %(default)s MB")
    size.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="default: %(default)s")
    sla = parser.add_argument_group("skip-layer attention (passed to the SLA run as they are)")
    sla.add_argument("--sla-skip-distance", type=int, nargs="+", metavar="N")
    sla.add_argument("--sla-source-layer", type=int, nargs="+", metavar="N")
    sla.add_argument("--sla-num-skip-groups", type=int, metavar="K")
    sla.add_argument("--sla-layers", metavar="RANGES")
    sla.add_argument("--sla-share", choices=tuple(SHARES))
    sla.add_argument("--sla-kv-projection", choices=KV_PROJECTIONS)
    args = parser.parse_args(argv[:end])
    args.megatron = argv[end + 1 :]
    check(args, parser)
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends with the parser's error, naming flag, value and what is accepted, for a value out of range."""
    ranges = [
        ("--train-iters", args.train_iters, args.train_iters >= 1, "an integer from 1"),
        ("--eval-iters", args.eval_iters, args.eval_iters >= 1, "an integer from 1"),
        ("--corpus-mb", args.corpus_mb, 1 <= args.corpus_mb <= 1000, "a number from 1 to 1000"),
        ("--vocab-size", args.vocab_size, 512 <= args.vocab_size <= 32_000, "an integer from 512 to 32000"),
        ("--tp", args.tp, args.tp in (None, 1, 2, 4, 8), f"1, 2, 4 or 8: the model has {flags.HEADS} heads"),
    ]
    for flag, value, good, accepted in ranges:
        if not good:
            parser.error(f"{flag} {value}: expected {accepted}")


def choose_ranks(args: argparse.Namespace) -> int:
    """Tensor-parallel size for this machine: one process per GPU, or any number of processes without GPUs."""
    import torch

    gpus = torch.cuda.device_count() if args.device == "auto" else 0
    if gpus and args.tp and args.tp > gpus:
        raise workdir.WorkdirError(f"--tp {args.tp}: expected at most {gpus}, the number of GPUs, or --device cpu")
    return args.tp or (1 if gpus == 1 else 2)


def sla_flags(args: argparse.Namespace) -> list[str]:
    """What the SLA run has on top of the dense run's flags."""
    given = ["--sla"]
    for name in SLA_SETTINGS:
        value = getattr(args, name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            given += [flag_of(name), *map(str, values)]
    return given


def check_sla(args: argparse.Namespace, ranks: int) -> None:
    """Raises FlagError for values that the SLA run would refuse only after the dense run has been trained.

    Left to the run itself when there are Megatron flags after `--`, which may change the model's shape.
    """
    if args.megatron:
        return
    from sla_megatron.flags.validation import resolve_sla_args

    model = {"num_layers": flags.LAYERS, "num_attention_heads": flags.HEADS, "group_query_attention": False}
    training = {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": 1, "optimizer": "adam"}
    rest = {"transformer_impl": "local", "recompute_granularity": None, "no_rope_freq": None, "fp8": None, "fp4": None}
    sla = {name: getattr(args, name) for name in SLA_SETTINGS}
    resolve_sla_args(argparse.Namespace(sla=True, **sla, **model, **training, **rest))


def settings(args: argparse.Namespace, ranks: int) -> dict:
    """What must stay the same for a directory's runs to be continued: everything but their length."""
    names = ("device", "text", "eval_iters", "corpus_mb", "vocab_size", "megatron")
    return {"tp": ranks, **{name: getattr(args, name) for name in (*names, *SLA_SETTINGS)}}


def duration(args: argparse.Namespace) -> str:
    """How long what is left to do takes on two cores, in words, and what machine this is."""
    results = [workdir.load_result(args.out, model) for model in workdir.MODELS] if not args.fresh else [None, None]
    iterations = sum(max(0, args.train_iters - (result.iteration if result else 0)) for result in results)
    seconds = OTHER_SECONDS + ITERATION_SECONDS * iterations
    if args.text == "prose" and not (args.out / "data").exists():
        seconds += PROSE_SECONDS
    minutes, cores = round(seconds / 60), os.cpu_count() or 1
    about = f"about {minutes} {'minutes' if minutes > 1 else 'minute'}"
    return f"{about} on two idle cores, less with a GPU (here: {cores} {'cores' if cores > 1 else 'core'})"
