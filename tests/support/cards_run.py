"""``make cards``: run the test of each workflow, which leaves its card in docs/cards, and write the pages.

    python -m tests.support.cards_run                    # all of them: minutes, most of them of the Slurm job
    python -m tests.support.cards_run pipeline sweep     # these

A workflow that cannot run on this machine keeps the card that it has.  Ends with status 1 where a test failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sla_megatron.common.files import write_json
from sla_megatron.common.flag_types import OneLineParser

from . import cards, cards_page
from .launch import ROOT


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tests."""
    parser = OneLineParser(prog="cards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(cards.WORKFLOWS)}; all without one")
    parser.add_argument("--folder", type=Path, default=ROOT / cards.CARDS, help="of the cards")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in cards.WORKFLOWS:
            parser.error(f"card {name}: expected one of {', '.join(cards.WORKFLOWS)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = [name for name in args.names or cards.WORKFLOWS if not write_card(name, args.folder)]
    cards_page.main(["--folder", str(args.folder)])
    if failed:
        sys.exit(f"cards: failed: {', '.join(failed)}")


def write_card(name: str, folder: Path) -> bool:
    """Run the test of ``name``, saying so; ``False`` where it can run and left no card."""
    workflow, path = cards.WORKFLOWS[name], folder / f"{name}.json"
    if why := workflow.missing():
        return _without(path, name, why)
    print(f"{name}: {workflow.test} ...", flush=True)
    before, began = _state(path), time.monotonic()
    python = str(ROOT / workflow.python) if workflow.python else sys.executable
    command = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", workflow.test]
    environment = os.environ | {cards.VARIABLE: str(folder.resolve())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode or _state(path) == before:
        print(f"{done.stdout[-6000:]}{done.stderr[-2000:]}{name}: left no card", flush=True)
        return False
    print(f"{name}: written, {time.monotonic() - began:.0f} s", flush=True)
    return True


def _without(path: Path, name: str, why: str) -> bool:
    """What is left of a workflow that cannot run here: the card that it has, or one that says so."""
    if path.exists():
        print(f"{name}: not run, its card stays: {why}", flush=True)
    else:
        print(f"{name}: not run: {why}", flush=True)
        write_json(path, {"workflow": name, "not_run": why})
    return True


def _state(path: Path) -> tuple[int, int] | None:
    """Another one when the file was replaced."""
    found = path.stat() if path.exists() else None
    return found and (found.st_ino, found.st_mtime_ns)


if __name__ == "__main__":
    main()
