"""What the commands of ``sla-job`` take in common."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ...common.errors import FlagError
from ...common.flag_types import WITH_VALUE, count
from .keep import Keep

#: How checkpoints are looked at while they are new.
CONTENTS, SIZES = "contents", "sizes"


def add_run(command: argparse.ArgumentParser) -> None:
    """``--run``."""
    folder = "the run's folder, where chain.json is"
    command.add_argument("--run", type=_folder, required=True, metavar="FOLDER", help=folder, **WITH_VALUE)


def add_flags(command: argparse.ArgumentParser) -> None:
    """Megatron's, behind ``--``."""
    command.add_argument("flags", nargs="*", metavar="-- FLAGS", help="all of Megatron's flags of the run")


def add_max_failures(command: argparse.ArgumentParser) -> None:
    """``--max-failures``."""
    limit = "failures in a row without a new checkpoint that end the chain (default: 3)"
    command.add_argument(
        "--max-failures", type=count("--max-failures"), default=3, metavar="N", help=limit, **WITH_VALUE
    )


def add_keep(command: argparse.ArgumentParser) -> None:
    """``--keep``, the script's ``KEEP``."""
    stay = "checkpoints that stay: 3, the newest 3; 3,every=10000, and every 10000th iteration (default: KEEP, or all)"
    default = os.environ.get("KEEP") or None
    command.add_argument("--keep", type=Keep.read, default=default, metavar="KEEP", help=stay, **WITH_VALUE)


def add_check(command: argparse.ArgumentParser) -> None:
    """``--check``, the script's ``CHECK``."""
    look = "contents: checksums and finite numbers of each new checkpoint; sizes: none (default: CHECK, or contents)"
    default = os.environ.get("CHECK") or CONTENTS
    command.add_argument("--check", type=_level, default=default, metavar="LEVEL", help=look, **WITH_VALUE)


def _level(text: str) -> str:
    if text not in (CONTENTS, SIZES):
        raise FlagError("--check", text, f"{CONTENTS} or {SIZES}")
    return text


def say(line: str) -> None:
    """A line for the job's log."""
    print(f"sla-job: {line}", flush=True)


def warn(line: str) -> None:
    """Likewise, beside what a command prints for its caller."""
    print(f"sla-job: {line}", file=sys.stderr, flush=True)


def _folder(text: str) -> Path:
    if not text:
        raise FlagError("--run", text, "the run's folder")
    return Path(text)
