"""Quickstart: train a dense and a skip-layer GPT on this Python's own sources, compare them, draw both, export one.

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

from examples.quickstart import build_dataset, flags, launch, options, picture, training_log, workdir
from examples.quickstart.corpus import CorpusError
from examples.quickstart.export import export
from examples.quickstart.report import report
from examples.quickstart.training_log import Result, summarise
from sla_megatron.common.errors import FlagError
from sla_megatron.common.files import write_whole
from sla_megatron.common.waiting import waiting_for


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
    argv += options.sla_flags(args) if model == "sla" else []
    log = args.out / f"{model}.log"
    records = launch.train(model, ranks, [*argv, *args.megatron], log)
    try:
        result = summarise(records, flags.TOKENS_PER_ITERATION)
    except ValueError as error:
        raise launch.TrainingFailed(f"quickstart: {model} training ended, but {error}: {log}") from None
    workdir.write_json(run_dir / "result.json", result.as_dict())
    return result


def quickstart(args: argparse.Namespace) -> None:
    """Data, dense run, SLA run, export, picture, report.

    Raises FlagError, WorkdirError, DatasetError or CorpusError (one line each), TrainingFailed (the end of a log),
    or SystemExit where sla-data has said its line.
    """
    workdir.read_settings(args.out)  # refuses somebody else's directory
    done = None if args.fresh else finished(args)
    takes = options.duration(args)
    # On a cold disk torch alone takes longer than anybody waits without a word.
    with waiting_for("quickstart", "loading torch" if done else f"takes {takes}; loading torch", quick=True):
        ranks = options.choose_ranks(args)
        options.check_sla(args, ranks)
    if not args.fresh:
        workdir.check_settings(args.out, options.settings(args, ranks))
        if done:
            print(done)
            return
    with workdir.locked(args.out):
        print(f"quickstart: a dense and a skip-layer GPT, {args.train_iters} iterations each: {takes}", flush=True)
        if args.fresh:
            workdir.clear(args.out)
        workdir.write_json(args.out / workdir.SETTINGS, options.settings(args, ranks))
        max_bytes = int(args.corpus_mb * 1e6)
        dataset = build_dataset.build(args.out / "data", max_bytes, args.vocab_size, text=args.text)
        dense, sla = (train_one(model, args, ranks, dataset) for model in workdir.MODELS)
        exported = export(args.out / "sla" / "checkpoints", args.out / "sla" / "hf", args.text)
        records = {model: training_log.read(args.out / f"{model}.log") for model in workdir.MODELS}
        drawn = picture.draw(records, flags.TOKENS_PER_ITERATION, args.out / workdir.PICTURE)
        text = report(args, dense, sla, exported, drawn)
        write_whole(args.out / "summary.txt", text.lstrip("\n"))
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
    args = options.parse_args(sys.argv[1:] if argv is None else argv, __doc__)
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
