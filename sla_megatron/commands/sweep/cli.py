"""``sla-sweep``: the paper's grid from one file, dense and skip-layer runs on equal tokens in equal order.

sla-sweep plan GRID.yaml                             the runs, checked with Megatron's parser; trains nothing
sla-sweep run GRID.yaml --out FOLDER                 train what has no row yet, here, one after another
sla-sweep submit GRID.yaml --out FOLDER -- OPTIONS   the same as one Slurm job array (DRY_RUN=1 prints it)
sla-sweep report --out FOLDER                        mean and spread over seeds, difference to dense, plots
sla-sweep task GRID.yaml --out FOLDER --index I      what one task of the array executes

docs/sweep.md describes the file.
"""

from __future__ import annotations

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ...common.errors import one_line_errors
from ...common.flag_types import OneLineParser
from ...common.tables import table
from .errors import RunBusy, RunFailed, SweepError
from .grid import Run, read_grid
from .local import num_processes, run_all
from .results_folder import SweepFolder


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.  What cannot be accepted ends it: one line on stderr, exit status 2; runs that failed, 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    # argparse takes what is behind -- where no option has come before it.
    end = words.index("--") if "--" in words else len(words)
    parser = _parser()
    args = parser.parse_args(words[:end])
    args.options = words[end + 1 :]
    if args.options and args.command is not _submit:
        parser.error(f"{' '.join(args.options)}: options behind -- are sbatch's, of submit")
    try:
        with one_line_errors("sla-sweep", all_ranks=True):
            status = args.command(args)
    except KeyboardInterrupt:
        print("sla-sweep: interrupted; the same command goes on", file=sys.stderr, flush=True)
        sys.exit(130)
    if status:
        sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="sla-sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function in (("plan", _plan), ("run", _run), ("submit", _submit), ("task", _task), ("report", _report)):
        command = commands.add_parser(name)
        command.set_defaults(command=function)
        if name != "report":
            command.add_argument("grid", type=Path, metavar="GRID.yaml")
            command.add_argument("--device", choices=("auto", "cpu", "cuda"), help="passed on to every run")
        if name != "plan":
            command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        if name == "submit":
            command.add_argument("--limit", type=int, metavar="N", help="tasks at a time (default: no limit)")
            command.epilog = "Behind -- are options of sbatch, such as --time=4:00:00."
        if name == "task":
            command.add_argument("--index", type=int, required=True, metavar="I", help="the run's place in the plan")
        if name == "report":
            form = command.add_mutually_exclusive_group()
            form.add_argument("--json", action="store_true", help="print JSON in place of the table")
            form.add_argument("--markdown", action="store_true", help="print Markdown in place of the table")
    return parser


def _say(line: str) -> None:
    print(f"sla-sweep: {line}", flush=True)


def _runs(args: Namespace) -> list[Run]:
    return read_grid(args.grid, ["--device", args.device] if args.device else [])


def _checked(runs: Sequence[Run], sweep: SweepFolder | None, processes: int | None = None) -> None:
    """What ``sweep`` and Megatron have against ``runs``, before anything is written."""
    if sweep is not None:
        sweep.accept(runs)
        # What was begun has been checked.
        runs = [run for run in runs if not sweep.run(run).begun.is_file()]
    if runs:
        # Importing Megatron takes seconds.
        print(f"sla-sweep: checking the flags of {len(runs)} runs", file=sys.stderr, flush=True)
        from .settle import check_runs

        check_runs(runs, processes)


def _plan(args: Namespace) -> int:
    runs = _runs(args)
    _checked(runs, None)
    rows = [(str(i), run.name, f"{run.iterations:,}", f"{run.tokens:,}") for i, run in enumerate(runs)]
    print(table(("index", "run", "iterations", "tokens"), rows, left=(1,)))
    print(f"{len(runs)} runs, {sum(run.tokens for run in runs):,} tokens")
    return 0


def _run(args: Namespace) -> int:
    runs, sweep, processes = _runs(args), SweepFolder(args.out), num_processes()
    _checked(runs, sweep, processes)
    sweep.create()
    return 1 if run_all(sweep, runs, processes, _say) else 0


def _submit(args: Namespace) -> int:
    from . import slurm

    if args.limit is not None and args.limit < 1:
        raise SweepError(f"--limit {args.limit}: expected 1 or more")
    runs, sweep = _runs(args), SweepFolder(args.out)
    _checked(runs, sweep)
    more = ["--device", args.device] if args.device else []
    words = slurm.command(args.grid, sweep, runs, args.limit, args.options, more)
    if words is None:
        _say(f"all {len(runs)} runs are finished")
    elif os.environ.get("DRY_RUN") == "1":
        print(slurm.shown(words))
    else:
        sweep.create()
        _say(slurm.submit(args.grid, sweep, words))
    return 0


def _task(args: Namespace) -> int:
    from .training import Launcher, train

    runs, sweep = _runs(args), SweepFolder(args.out)
    if not 0 <= args.index < len(runs):
        raise SweepError(f"--index {args.index}: expected 0 to {len(runs) - 1}, a run of {args.grid}")
    run = runs[args.index]
    sweep.accept([run])
    sweep.create()
    in_job = "SLURM_JOB_ID" in os.environ
    _say(f"{run.name}: {run.iterations} iterations; log: {sweep.run(run).log}")
    try:
        row = train(sweep, run, Launcher.slurm() if in_job else Launcher.local(num_processes()), _say, lambda *_: None)
    except (RunFailed, RunBusy) as fault:
        print(f"sla-sweep: error: {fault}", file=sys.stderr, flush=True)
        return 1
    _say(f"{run.name}: validation loss {row['validation_loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s")
    return 0


def _report(args: Namespace) -> int:
    from .plot import plot
    from .report import as_json, as_markdown, as_text
    from .summary import groups

    sweep = SweepFolder(args.out)
    sweep.require()
    rows = sweep.collect()
    if not rows:
        raise SweepError(f"--out {args.out}: no run is finished yet: expected one or more")
    found = groups(rows)
    if args.json:
        print(as_json(found, rows))
    else:
        print(as_markdown(found) if args.markdown else as_text(found))
    if unfinished := sweep.unfinished():
        print(f"sla-sweep: begun and not finished: {', '.join(unfinished)}", file=sys.stderr)
    if find_spec("matplotlib") is None:
        print("sla-sweep: no plots: expected matplotlib to be installed: pip install matplotlib", file=sys.stderr)
    else:
        written = [sweep.path / "results.jsonl", *plot(found, sweep.path)]
        print("sla-sweep: written:", *written, file=sys.stderr)
    return 0


if __name__ == "__main__":
    main()
