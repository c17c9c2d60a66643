"""What the commands of ``sla-job`` take in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...common.errors import FlagError
from ...common.flag_types import WITH_VALUE, count


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


def say(line: str) -> None:
    """A line for the job's log."""
    print(f"sla-job: {line}", flush=True)


def _folder(text: str) -> Path:
    if not text:
        raise FlagError("--run", text, "the run's folder")
    return Path(text)
