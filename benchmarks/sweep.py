"""The rows of a sweep as a result of ``benchmarks/results``.

python -m benchmarks.sweep runs/cpu-sweep --out benchmarks/results/sweep-cpu.json

A row is sla-sweep's, and has the run's validation losses by tokens; NAME-tokens.svg beside the result shows them where
a run was evaluated more than once.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sla_megatron.commands.sweep import plot as sweep_plot
from sla_megatron.commands.sweep.errors import SweepError
from sla_megatron.commands.sweep.report import HEADER, cells, note
from sla_megatron.commands.sweep.results_folder import RunFolder, SweepFolder
from sla_megatron.commands.sweep.summary import Group, groups
from sla_megatron.commands.sweep.training_log import read_log

from .loss_by_tokens import plot_losses
from .paired import difference
from .record import Table, add_output_args, check_output, write_result

NAME = "sweep"

#: Of sla-sweep's table.  Runs one after the other compare no speeds; of ``less dense`` there is the interval.
_LEFT_OUT = ("tokens/s", "less dense")
_PAIRED = ("less dense (95 % interval)", "p", "below")
_NOTE = """
95 % interval and p: the paired t test over seeds, which takes differences as normal; below: seeds in which the
loss is below dense. One of twenty intervals leaves 0 out where there is no difference."""


def main() -> None:
    """Collect the rows, print their table and write ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of sla-sweep run or submit")
    args = add_output_args(parser, NAME).parse_args()
    check_output(parser, args)
    sweep = SweepFolder(args.folder)
    try:
        sweep.require()
    except SweepError as error:
        parser.error(str(error).replace("--out", "FOLDER"))
    rows = sweep.rows()
    devices = {row["device"] for row in rows}
    if len(devices) != 1:
        parser.error(f"FOLDER {args.folder}: {len(rows)} rows of {len(devices)} devices: expected rows of one device")
    rows = [row | {"validation_losses": _by_tokens(args.folder, row)} for row in rows]
    write_result(args, NAME, devices.pop(), rows, tables, plot)


def _by_tokens(folder: Path, row: dict[str, Any]) -> list[list[float]]:
    """``[tokens, loss]`` of each evaluation in the run's log; of one that was removed, that of the row."""
    log = RunFolder(folder / "runs" / row["name"]).log
    if not log.is_file():
        return [[row["tokens"], row["validation_loss"]]]
    with log.open(errors="replace") as lines:
        losses = read_log(line.rstrip("\n") for line in lines).validation_losses()
    each = row["tokens"] // row["iterations"]
    return [[iteration * each, loss] for iteration, loss in losses.items()]


def tables(result: dict[str, Any]) -> list[Table]:
    """One line a setting, over its seeds."""
    found = groups(result["rows"])
    kept = [column for column, name in enumerate(HEADER) if name not in _LEFT_OUT]
    header = (*(HEADER[column] for column in kept), *_PAIRED)
    rows = [(*(cells(group)[column] for column in kept), *paired_cells(group)) for group in found]
    title = f"Validation loss, {result['rows'][0]['tokens']:,} tokens a run"
    return [Table(title, header, rows, (0, 4), note(found) + _NOTE)]


def paired_cells(group: Group) -> tuple[str, str, str]:
    """Those of :data:`_PAIRED`: ``-0.0123 (-0.0200 to -0.0046)``, ``0.012``, ``3 of 3``; none without a dense run."""
    if not group.differences:
        return "", "", ""
    return difference(list(group.differences.values())).cells


def plot(result: dict[str, Any], path: Path) -> None:
    """The first of the sweep's pictures in ``path``, the others beside it, such as ``sweep-cpu-heads.svg``."""
    rows: Sequence[dict[str, Any]] = result["rows"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        first, *others = sweep_plot.plot(groups(rows), Path(folder))
        first.replace(path)
        for other in others:
            other.replace(path.with_name(f"{path.stem}-{other.stem.rpartition('-')[2]}.svg"))
    if any(len(row.get("validation_losses", ())) > 1 for row in rows):
        plot_losses(rows, path.with_name(f"{path.stem}-tokens.svg"))


if __name__ == "__main__":
    main()
