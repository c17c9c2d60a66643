"""``sla-job stage``: a node's own copy of the data, before each attempt."""

from __future__ import annotations

import os
import socket
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...common.errors import FlagError
from ...common.flag_types import WITH_VALUE
from .arguments import add_flags, add_run, say
from .staging import stage_data

HELP = "copy the data that the flags name to a disk of this node's own, but for what is there"


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)
    add_flags(command)
    to = "an absolute path, the same on every node; a copy lies below it at its source's own path"
    command.add_argument("--to", type=_folder, required=True, metavar="FOLDER", help=to, **WITH_VALUE)


def run(args: Namespace) -> int:
    stage_data(args.flags, args.to, os.environ.get("SLURMD_NODENAME", socket.gethostname()), say)
    return 0


def _folder(text: str) -> Path:
    if not os.path.isabs(text):
        raise FlagError("--to", text, "an absolute path, the same on every node")
    return Path(os.path.normpath(text))
