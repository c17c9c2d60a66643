"""Quickstart: train a dense and a skip-layer GPT on this Python's own sources, compare them, export one.

    make quickstart                                            # both, tensor-parallel over two processes
    python -m examples.quickstart.run --train-iters 320        # the same from the repository root; continues
    python -m examples.quickstart.run --out runs/pruned --sla-kv-projection pruned
    python -m examples.quickstart.run --out runs/bf16 -- --bf16     # flags after -- go to Megatron, both runs

An interrupted quickstart continues from its last checkpoints. Nothing that is finished is overwritten.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from examples.quickstart import build_dataset, flags, launch, workdir
from examples.quickstart.corpus import CorpusError
from examples.quickstart.export import export
from examples.quickstart.training_log import Result, summarise, table
from sla_megatron.attention.sla_config import KV_PROJECTIONS, SHARES
from sla_megatron.common.errors import FlagError, flag_of
from sla_megatron.common.flag_types import OneLineParser
from sla_megatron.flags.skipping import SLA_SETTINGS
from sla_megatron.flags.validation import resolve_sla_args


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Options, with `megatron` (what follows `--`). One line and exit code 2 for what cannot be accepted."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = OneLineParser(prog="quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier quickstart left in --out")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: GPUs if there are any")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor-parallel ranks; default: 2, or 1 on a single GPU")
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
    model = {"num_layers": flags.LAYERS, "num_attention_heads": flags.HEADS, "group_query_attention": False}
    training = {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": 1, "optimizer": "adam"}
    rest = {"transformer_impl": "local", "recompute_granularity": None, "no_rope_freq": None, "fp8": None, "fp4": None}
    sla = {name: getattr(args, name) for name in SLA_SETTINGS}
    resolve_sla_args(argparse.Namespace(sla=True, **sla, **model, **training, **rest))


def settings(args: argparse.Namespace, ranks: int) -> dict:
    """What must stay the same for a directory's runs to be continued: everything but their length."""
    names = ("device", "eval_iters", "corpus_mb", "vocab_size", "megatron")
    return {"tp": ranks, **{name: getattr(args, name) for name in (*names, *SLA_SETTINGS)}}


def train_one(model: str, args: argparse.Namespace, ranks: int, dataset: build_dataset.Dataset) -> Result:
    """Trains `model` ("dense" or "sla") from its last checkpoint, or from scratch, to --train-iters."""
    run_dir = args.out / model
    earlier = workdir.load_result(args.out, model)
    if earlier and earlier.iteration >= args.train_iters:
        print(f"\n{model}: finished in an earlier launch, kept", flush=True)
        return earlier
    argv = flags.training_flags(dataset, run_dir, args.out / "cache", args.train_iters, args.eval_iters)
    argv += ["--tensor-model-parallel-size", str(ranks)]
    argv += ["--device", "cpu"] if args.device == "cpu" else []
    argv += sla_flags(args) if model == "sla" else []
    log = args.out / f"{model}.log"
    records = launch.train(model, ranks, [*argv, *args.megatron], log)
    try:
        result = summarise(records, flags.TOKENS_PER_ITERATION)
    except ValueError as error:
        raise launch.TrainingFailed(f"quickstart: {model} training ended, but {error}: {log}") from None
    workdir.write_json(run_dir / "result.json", result.as_dict())
    return result


def report(args: argparse.Namespace, dense: Result, sla: Result, exported: str) -> str:
    """The table, where things are, and what to do next."""
    make = "make quickstart QUICKSTART_ARGS="
    longer = f"--out {args.out} --train-iters {2 * args.train_iters}"
    return f"""
{table(dense, sla)}

Measured on this machine by this quickstart. The train loss is the mean since the last line but one; the speed
is the median over the lines, and varies with whatever else the machine is doing.
  checkpoints  {args.out}/dense/checkpoints  {args.out}/sla/checkpoints
  logs         {args.out}/dense.log  {args.out}/sla.log  (the first line is the command to run by hand)
  curves       {Path(sys.executable).parent}/tensorboard --logdir {args.out}
{exported}
Next
  train longer, from these checkpoints      {make}"{longer}"
  leave out the projections nobody reads    {make}"--out runs/pruned --sla-kv-projection pruned"
  train on GPUs                             the same commands, on a machine that has them
"""


def quickstart(args: argparse.Namespace) -> None:
    """Data, dense run, SLA run, table.

    Raises FlagError, WorkdirError, DatasetError or CorpusError (one line each), TrainingFailed (the end of a log),
    or SystemExit where sla-data has said its line.
    """
    ranks = choose_ranks(args)
    check_sla(args, ranks)
    if args.fresh:
        workdir.read_settings(args.out)  # refuses somebody else's directory
    else:
        workdir.check_settings(args.out, settings(args, ranks))
        if done := finished(args):
            print(done)
            return
    with workdir.locked(args.out):
        if args.fresh:
            workdir.clear(args.out)
        workdir.write_json(args.out / workdir.SETTINGS, settings(args, ranks))
        dataset = build_dataset.build(args.out / "data", int(args.corpus_mb * 1e6), args.vocab_size)
        dense, sla = (train_one(model, args, ranks, dataset) for model in workdir.MODELS)
        exported = export(args.out / "sla" / "checkpoints", args.out / "sla" / "hf")
        text = report(args, dense, sla, exported)
        (args.out / "summary.txt").write_text(text.lstrip())
        print(text, flush=True)


def finished(args: argparse.Namespace) -> str | None:
    """One line that says so when --out already holds both runs at --train-iters or beyond."""
    results = [workdir.load_result(args.out, model) for model in workdir.MODELS]
    if all(result and result.iteration >= args.train_iters for result in results):
        reached = min(result.iteration for result in results)
        return (
            f"quickstart: {args.out} holds a finished run of {reached} iterations, see its summary.txt; "
            f"--train-iters above {reached} continues it, --out DIR goes elsewhere, --fresh starts over"
        )
    return None


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 after one line (or the end of training's log) on stderr, or sla-data's after its line."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    # So that a terminated quickstart ends its training processes instead of leaving them behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        quickstart(args)
    except (FlagError, launch.TrainingFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except (workdir.WorkdirError, build_dataset.DatasetError, CorpusError) as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nquickstart: interrupted; the same command continues from {args.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
