"""``sla-job verify``: looks into all checkpoints of a run or a folder, for people."""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...common.amounts import shown_size
from ...common.checkpoint_contents import damage, size
from ...common.checkpoint_folders import checkpoints
from ...common.errors import FlagError
from ...common.flag_types import WITH_VALUE
from .checked import Checked, fingerprint

HELP = "look into all checkpoints: checksums and finite numbers; status 1 if one is damaged"


def add_arguments(command: ArgumentParser) -> None:
    folder = "the run's folder: its checkpoints, and its checked.json, where what is found is noted"
    command.add_argument("--run", type=Path, metavar="FOLDER", help=folder, **WITH_VALUE)
    save = "a folder of checkpoints, or one of them (default: RUN/checkpoints)"
    command.add_argument("--save", type=Path, metavar="FOLDER", help=save, **WITH_VALUE)


def run(args: Namespace) -> int:
    # A launcher's Python need not have tqdm for the other commands.
    from ...common.waiting import bar

    paths = _found(args)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    damaged = 0
    for path in paths:
        began = time.monotonic()
        try:
            before, total = fingerprint(path), size(path)
            with bar(f"sla-job: {path.name}", total, leave=False) as shown:
                found = damage(path, shown.update)
        except FileNotFoundError:
            print(f"{path}: removed meanwhile", flush=True)
            continue
        if args.run is not None and path.name.startswith("iter_"):
            Checked(args.run).note(path, before, None if found is None else found.text)
        damaged += found is not None
        seconds = time.monotonic() - began
        print(f"{path}: {found or 'whole and finite'}, {shown_size(total)} in {seconds:.1f} s", flush=True)
    return 1 if damaged else 0


def _found(args: Namespace) -> list[Path]:
    if args.run is None and args.save is None:
        raise FlagError("--run", None, "the run's folder, or --save with a folder of checkpoints")
    save = args.run / "checkpoints" if args.save is None else args.save
    flag = "--run" if args.save is None else "--save"
    one = [save] if (save / "metadata.json").is_file() else []
    paths = one or [*checkpoints(save).values(), *([save / "release"] if (save / "release").is_dir() else [])]
    if not paths:
        raise FlagError(flag, args.run if args.save is None else save, f"checkpoints, iter_* folders, in {save}")
    return paths
