"""Use the minutes that there are on a GPU: checks, speed, decoding, loss, and what several GPUs show, in one archive.

    make gpu-report MINUTES=10
    python -m benchmarks.gpu_report --minutes 10 --out runs/gpu-report     # the same; again: goes on
    python -m benchmarks.gpu_report --rows checks loss --device cpu        # tiny rows, to try it on a processor

The most telling rows come first; one for which too little time is left is passed over for a shorter one.  A row is a
process of its own and is ended when its time is up.  The same command again runs what is not done yet: a row that is
done stays so as long as its command, the device and the sources are the same.  Nothing is written but --out and the
archive beside it.  Exit status: 0, or 1 where a row failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sla_megatron.common import flag_types
from sla_megatron.common.errors import FlagError, one_line_errors

from ..record import ROOT
from .folder import CUT, DONE, FAILED, MADE_BY, NO_GPUS, NO_TIME, Folder, fingerprint
from .rows import Row, rows_for
from .running import environment, run


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] | None = None) -> int:
    """The command; its exit status.

    Args:
        argv: its flags.
        rows: other rows than those of the device.
    """
    begin = time.monotonic()
    with one_line_errors(MADE_BY):
        args = make_parser().parse_args(argv)
        folder = Folder(args.out)
        rows = chosen(rows_for(args.device) if rows is None else rows, args.rows)
        said = f"gpu-report: {args.minutes:g} minutes, {len(rows)} rows, into {args.out}; looks at the machine"
        print(said, flush=True)
        machine = versions(args.device)
        about = {"minutes": args.minutes, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "machine": machine}
        # As Ctrl-C: what runs is ended, and what is done is packed.
        before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            with folder.enter(about):
                run_all(rows, folder, machine, args.device, begin + 60 * args.minutes)
        except KeyboardInterrupt:
            print("gpu-report: interrupted; the same command goes on", file=sys.stderr)
            return 130
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print(f"\n{folder.text()}\n\nall of it: {folder.archive}", flush=True)
    statuses = [folder.rows[row.name]["status"] for row in rows]
    if any(status in (FAILED, CUT, NO_TIME) for status in statuses):
        print("the same command again runs what is not done, and nothing else", flush=True)
    return int(FAILED in statuses)


def make_parser() -> argparse.ArgumentParser:
    """Of the command."""
    minutes = flag_types.number("--minutes", float, "a number of minutes, more than 0")
    parser = flag_types.OneLineParser(
        MADE_BY, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=minutes, default=10.0, metavar="M", help="at most (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-report"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these alone, in this order (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny rows (default: cuda)")
    return parser


def _stop(number: int, _: Any) -> None:
    sys.exit(128 + number)


def chosen(rows: Sequence[Row], names: Sequence[str] | None) -> list[Row]:
    """The rows of ``names``, in their order.  Raises :class:`FlagError` for a name that there is not."""
    known = {row.name: row for row in rows}
    for name in names or ():
        if name not in known:
            raise FlagError("--rows", name, f"some of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or known)]


def versions(device: str) -> dict[str, Any]:
    """Of the machine.  Raises :class:`FlagError` where it has no GPU and one is wanted."""
    asked = [sys.executable, "-m", f"{__package__}.versions", device]
    found = subprocess.run(asked, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"cannot tell what the machine has: {found.stderr[-2000:]}")
    machine = json.loads(found.stdout.splitlines()[-1])
    if device == "cuda" and not machine["gpus"]:
        raise FlagError("--device", device, "cpu on this machine: torch finds no CUDA GPU here")
    return machine


def run_all(rows: Sequence[Row], folder: Folder, machine: dict[str, Any], device: str, deadline: float) -> None:
    """Each row that is not done, as long as there is time."""

    def say(line: str) -> None:
        left = max(0, deadline - time.monotonic())
        print(f"[{left // 60:.0f}:{left % 60:02.0f} left] {line}", flush=True)

    gpus = len(machine["gpus"])
    say(f"{gpus} x {machine['device']}" if gpus else f"{machine['processor']}: tiny rows, whose speed says nothing")
    given = environment(folder.tmp, device)
    for row in rows:
        key = fingerprint(row.command, machine["device"])
        about = {"command": ["python", *row.command], "commit": machine["commit"], "key": key}
        earlier = folder.rows.get(row.name, {})
        left = deadline - time.monotonic()
        if earlier.get("status") == DONE and earlier["key"] == key and folder.of(row.name).is_dir():
            say(f"{row.name}: done before, kept")
        elif device == "cuda" and row.gpus > gpus:
            said = f"not run: needs {row.gpus} GPUs"
            folder.record(row.name, status=NO_GPUS, said=said, **about)
            say(f"{row.name}: {said}")
        elif left < row.seconds:
            said = f"not run: needs about {row.seconds:.0f} s, {max(0, left):.0f} s were left"
            folder.record(row.name, status=NO_TIME, said=said, **about)
            say(f"{row.name}: {said}")
        else:
            seconds = min(left, row.limit)
            say(f"{row.name}: starts, about {row.seconds:.0f} s")
            outcome = run(row, folder.begin(row.name), given, seconds, say)
            folder.record(row.name, status=outcome.status, seconds=outcome.seconds, said=outcome.said, **about)
            # Now, too: the machine may be gone before the end.
            folder.pack()
            say(f"{row.name}: {outcome.status} in {outcome.seconds:.0f} s: {outcome.said}")


if __name__ == "__main__":
    sys.exit(main())
