"""A newcomer's way through a fresh clone, timed: the first word, the first loss, the export, the first plan.

    python -m benchmarks.newcomer                   # with this environment: about 5 minutes on two cores
    python -m benchmarks.newcomer --runs 3 --venv   # each clone makes its own, which takes minutes and 6 GB

Clones this repository at HEAD into a temporary folder and runs there what the README names first: what ``make
quickstart`` runs, then the README's ``sla-plan`` command.  Real processes; a time is that at which a line came.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.flag_types import count
from sla_megatron.common.launchers import stop

from .record import ROOT, Table, add_output_args, check_output, shown, spread, write_result

NAME = "newcomer"

#: Of a run, in the order in which a reader meets them.
STEPS = {
    "clone": "git clone",
    "environment": "make venv: `.venv`, from nothing",
    "first_word": "quickstart: its first line",
    "first_loss": "quickstart: the first loss",
    "export": "quickstart: an export that computes what Megatron computes",
    "quickstart": "quickstart: all of it",
    "longest_silence": "quickstart: the longest time without a line",
    "plan": "sla-plan: the README's plan",
}
_FIRST_LOSS = re.compile(r"^ *(?:dense|sla) +\d+/\d+ +loss \d")
_EXPORTED = re.compile(r"^export: .*logits equal")
_PLAN = re.compile(r"^```sh\n(sla-plan .*?)^```", re.MULTILINE | re.DOTALL)


class Line(NamedTuple):
    """What a command said, and when, in seconds since its start."""

    at: float
    text: str


class PathError(RuntimeError):
    """A step of the way failed; the message holds the end of what it said."""


def main() -> None:
    """Parse the flags, go the way ``--runs`` times, write the result."""
    parser = make_parser()
    with one_line_errors():
        args = parser.parse_args()
    check_output(parser, args)
    if not os.access(args.python, os.X_OK):
        parser.error(f"--python {args.python}: expected a Python that can be run")
    if not (ROOT / ".git").exists():
        parser.error(f"{ROOT}: expected a clone of the repository")
    try:
        runs = [one_run(args) for _ in range(args.runs)]
    except PathError as error:
        sys.exit(f"benchmarks.newcomer: error: {error}")
    rows = [{"step": step, "seconds": spread([run[step] for run in runs])} for step in STEPS if step in runs[0]]
    # The result's versions say which it was; where it lies is this machine's.
    args.python = Path(args.python).name
    write_result(args, NAME, "cpu", rows, tables)


def make_parser() -> argparse.ArgumentParser:
    """Of the command."""
    parser = argparse.ArgumentParser(
        prog=f"benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="of the environment; default: this")
    parser.add_argument("--venv", action="store_true", help="make .venv in each clone, with --python, and time it too")
    parser.add_argument("--runs", type=count("--runs"), default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--quickstart-args", default="", metavar="ARGS", help="passed on to the quickstart, in one word; default: none"
    )
    parser.add_argument("--note", default="", help="what else the machine did meanwhile")
    return add_output_args(parser, NAME)


def one_run(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each step, in a clone of its own, which is gone afterwards.  Raises :class:`PathError`."""
    with tempfile.TemporaryDirectory(prefix="sla-newcomer-") as folder:
        clone, python = Path(folder, "sla-megatron"), Path(os.path.abspath(args.python))
        cloning = ["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)]
        found = {"clone": said(cloning, Path(folder))[-1].at}
        if args.venv:
            found["environment"] = said(["make", "venv", f"PYTHON={python}"], clone)[-1].at
            python = clone / ".venv" / "bin" / "python"
        # The command of `make quickstart`, which would make .venv.
        quickstart = [str(python), "-m", "examples.quickstart.run", "--device", "cpu", *args.quickstart_args.split()]
        found |= moments(said(quickstart, clone, python.parent))
        (plan,) = _PLAN.findall((clone / "README.md").read_text())
        found["plan"] = said(["sh", "-c", plan], clone, python.parent)[-1].at
    return found


def said(command: Sequence[str], folder: Path, programs: Path | None = None) -> list[Line]:
    """What ``command`` says in ``folder``, passed on with the time of each line; the last one, empty, is its end.

    ``programs`` is searched first.  Raises :class:`PathError` where it ends with anything but 0.
    """
    # The clone's code, whichever checkout the environment was made for.
    environment = os.environ | {"PYTHONPATH": str(folder), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    lines, begun = [], time.perf_counter()
    child = subprocess.Popen(
        command,
        cwd=folder,
        env=environment if programs else os.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        for text in child.stdout:
            lines.append(Line(time.perf_counter() - begun, text.rstrip("\n")))
            print(f"{lines[-1].at:7.1f} {lines[-1].text}", flush=True)
        status = child.wait()
    except BaseException:
        stop(child)
        raise
    if status:
        end = "\n".join(line.text for line in lines[-20:])
        raise PathError(f"{' '.join(command)} ended with {status}:\n{end}")
    return [*lines, Line(time.perf_counter() - begun, "")]


def moments(lines: Sequence[Line]) -> dict[str, float]:
    """Of a quickstart, when each of its steps was there.  Raises :class:`PathError` where one never was."""
    times = [0.0, *(line.at for line in lines)]
    return {
        "first_word": lines[0].at,
        "first_loss": _first(lines, _FIRST_LOSS, "a loss"),
        "export": _first(lines, _EXPORTED, "an export with equal logits"),
        "quickstart": times[-1],
        "longest_silence": max(after - before for before, after in pairwise(times)),
    }


def _first(lines: Iterable[Line], wanted: re.Pattern[str], what: str) -> float:
    for line in lines:
        if wanted.search(line.text):
            return line.at
    raise PathError(f"the quickstart ended without {what}")


def tables(result: dict[str, Any]) -> list[Table]:
    """A line a step."""
    rows = [[STEPS[row["step"]], shown(row["seconds"], 1), str(row["seconds"]["n"])] for row in result["rows"]]
    settings = result["settings"]
    note = "Seconds from the start of its own command to the line that shows it, on the CPU. "
    note += "" if settings["venv"] else "The environment was there before. "
    note += f"The quickstart had {settings['quickstart_args']}. " if settings["quickstart_args"] else ""
    note += f"Meanwhile: {settings['note']}." if settings["note"] else ""
    return [Table("A newcomer's first minutes, in a fresh clone", ["step", "seconds", "runs"], rows, note=note.strip())]


if __name__ == "__main__":
    main()
