"""The rows of a sweep as a result of ``benchmarks/results``.

python -m benchmarks.sweep runs/cpu-sweep --out benchmarks/results/sweep-cpu.json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from sla_megatron.commands.sweep import plot as sweep_plot
from sla_megatron.commands.sweep.errors import SweepError
from sla_megatron.commands.sweep.report import HEADER, cells, note
from sla_megatron.commands.sweep.results_folder import SweepFolder
from sla_megatron.commands.sweep.summary import groups

from .record import Table, add_output_args, check_output, write_result

NAME = "sweep"


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
    write_result(args, NAME, devices.pop(), rows, tables, plot)


def tables(result: dict[str, Any]) -> list[Table]:
    """One line a setting, over its seeds."""
    found = groups(result["rows"])
    rows = [cells(group) for group in found]
    title = f"Validation loss, {result['rows'][0]['tokens']:,} tokens a run"
    return [Table(title, HEADER, rows, (0, 4), note(found))]


def plot(result: dict[str, Any], path: Path) -> None:
    """The first of the sweep's pictures in ``path``, the others beside it, such as ``sweep-cpu-heads.svg``."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        first, *others = sweep_plot.plot(groups(result["rows"]), Path(folder))
        first.replace(path)
        for other in others:
            other.replace(path.with_name(f"{path.stem}-{other.stem.rpartition('-')[2]}.svg"))


if __name__ == "__main__":
    main()
