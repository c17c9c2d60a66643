"""What every benchmark writes: a JSON file that says where, when and how its rows were measured, a table, a plot."""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla_megatron.common import figures
from sla_megatron.common.environment import commit, machine
from sla_megatron.common.files import read_json, write_json
from sla_megatron.common.tables import table

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Table:
    """One table of a result; cells are text.  Columns in ``left`` are aligned left."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    note: str = ""

    def as_text(self) -> str:
        """For a terminal."""
        lines = [self.title, table(self.header, self.rows, self.left), *([self.note] if self.note else [])]
        return "\n".join(lines) + "\n"

    def as_markdown(self) -> str:
        """For ``docs/results.md`` and the pages below it."""
        rule = [":--" if column in self.left else "--:" for column in range(len(self.header))]
        rows = ["| " + " | ".join(cells) + " |" for cells in (self.header, rule, *self.rows)]
        title = [f"**{self.title}**", ""] if self.title else []
        return "\n".join([*title, *rows, *(["", self.note] if self.note else [])]) + "\n"


def add_output_args(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    """Add ``--out`` and ``--overwrite`` of the benchmark ``name``."""
    default = Path("runs") / "benchmarks" / f"{name}.json"
    parser.add_argument(
        "--out", type=Path, default=default, metavar="FILE", help=f"JSON file, its plot beside it (default: {default})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
    return parser


def check_output(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line, before anything is measured, where ``--out`` cannot be written."""
    if args.out.suffix != ".json":
        parser.error(f"--out {args.out}: expected a name that ends in .json")
    if os.path.lexists(args.out) and not args.overwrite:
        parser.error(f"--out {args.out} is there: expected another name, or --overwrite")
    # Pictures of a result that is replaced are replaced with it.
    for what in ("", "-heads", "-tokens"):
        picture = args.out.with_name(f"{args.out.stem}{what}.svg")
        if os.path.lexists(picture) and not _is_result(args.out):
            parser.error(f"--out {args.out}: {picture} is there, and of no benchmark: expected another name")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}: expected a folder that can be written")


def _is_result(path: Path) -> bool:
    try:
        return "benchmark" in read_json(path)
    except (OSError, TypeError, ValueError):
        return False


def write_result(
    args: argparse.Namespace,
    name: str,
    device: str,
    rows: Sequence[dict[str, Any]],
    tables: Callable[[dict[str, Any]], list[Table]],
    plot: Callable[[dict[str, Any], Path], None] | None = None,
    checkout: Path | None = None,
) -> dict[str, Any]:
    """Write ``--out`` and, with matplotlib, the plot beside it; print the tables.  Returns what was written.

    Args:
        args: of the command, with those of :func:`add_output_args`.
        name: the benchmark's.
        device: ``cpu``, or the GPU's name.
        rows: what was measured.
        tables: makes the tables from the result.
        plot: draws the result into a file.
        checkout: whose commit was measured; this one's if None.
    """
    settings = {k: v if isinstance(v, int | float | str | list | None) else str(v) for k, v in vars(args).items()}
    for what in ("out", "overwrite"):
        settings.pop(what, None)
    result = {
        "benchmark": name,
        "command": command_line(),
        "commit": commit(checkout or ROOT),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "settings": settings,
        "rows": list(rows),
    }
    publish(result, args.out, tables, plot)
    return result


def publish(
    result: dict[str, Any],
    path: Path,
    tables: Callable[[dict[str, Any]], list[Table]],
    plot: Callable[[dict[str, Any], Path], None] | None,
) -> None:
    """Write ``result`` to ``path`` and, with matplotlib, the plot beside it; print the tables."""
    write_json(path, result)
    for each in tables(result):
        print(each.as_text(), flush=True)
    written = [path]
    if plot is not None:
        try:
            import matplotlib
        except ModuleNotFoundError:
            print("no plot: it needs matplotlib (pip install matplotlib)")
        else:
            matplotlib.use("Agg")
            # The same picture from the same figures, byte for byte.
            matplotlib.rcParams["svg.hashsalt"] = result["benchmark"]
            written.append(path.with_suffix(".svg"))
            plot(result, written[-1])
    print("written:", *written)


def save_figure(figure: Any, path: Path) -> None:
    """``figure`` as ``path``, without a margin."""
    figures.save_figure(figure, path, bbox_inches="tight")


def draw_band(axis: Any, x: Sequence[float], several: Sequence[Sequence[float]], **style: Any) -> None:
    """A line of the means of ``several`` values at each ``x``, in a band from least to most."""
    (line,) = axis.plot(x, [statistics.fmean(each) for each in several], marker="o", markersize=3, **style)
    low, high = [min(each) for each in several], [max(each) for each in several]
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def command_line() -> str:
    """The command that is running, as it can be repeated from the repository's root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name] if spec else ["python", os.path.relpath(sys.argv[0], ROOT)]
    return shlex.join([*program, *sys.argv[1:]])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of ``values``, and how many there are."""
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(figures: dict[str, float], digits: int = 3) -> str:
    """A :func:`spread` as ``1.234 (1.200-1.300)``."""
    median, least, most = (f"{figures[what]:.{digits}f}" for what in ("median", "min", "max"))
    return f"{median} ({least}-{most})"
