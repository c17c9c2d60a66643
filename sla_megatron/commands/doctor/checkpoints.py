"""Where the job saves and loads: writable, one file system for all nodes, large enough, and what would be loaded."""

from __future__ import annotations

import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from ...common.amounts import shown_size
from ...common.checkpoint_folders import TRACKER, problem
from .checkpoint_size import checkpoint_bytes, parameter_count
from .finding import Doubt, Fault, Skipped
from .folders import nearest_existing, require_writable

#: Seconds that a file may take to be seen on another node: network file systems remember for a while what is absent.
VISIBLE_WITHIN = 10.0


def save_folder(args: Namespace) -> str:
    """``--save`` can be written to; where it is not there yet, its parent, and it is not made."""
    if args.save is None:
        raise Skipped("no --save: nothing will be saved")
    if "://" in args.save:
        raise Skipped(f"--save {args.save}: object storage is not examined")
    return f"{args.save}{require_writable(Path(args.save), '--save')}"


def sees_probe(probe: dict[str, str] | None, node: str, within: float = VISIBLE_WITHIN) -> str:
    """This node finds the file that rank 0's made: ``path``, ``token`` and ``node``; None if it made none."""
    if probe is None:
        raise Skipped("no --save that rank 0 could write to")
    if probe["node"] == node:
        return f"{os.path.dirname(probe['path'])} is the same on all nodes"
    deadline = time.monotonic() + within
    while True:
        try:
            if Path(probe["path"]).read_text() == probe["token"]:
                return f"{os.path.dirname(probe['path'])} is the same on all nodes"
            reason = "another file is there"
        except OSError as error:
            reason = error.strerror
        if time.monotonic() > deadline:
            raise Fault(
                f"does not see a file that node {probe['node']} made in {os.path.dirname(probe['path'])} ({reason}): "
                "expected --save on a file system that all nodes share"
            )
        time.sleep(0.2)


def space(
    args: Namespace,
    vocabulary: int | None,
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> str:
    """The file system of ``--save`` has room for one checkpoint, by an estimate."""
    if args.save is None or "://" in args.save:
        raise Skipped("no folder to save to")
    parameters = parameter_count(args, vocabulary)
    need, free = checkpoint_bytes(args, parameters), free_bytes(nearest_existing(Path(args.save)))
    count = str(parameters)
    if parameters >= 1e6:
        count = f"{parameters / 1e6:.3g} million" if parameters < 1e9 else f"{parameters / 1e9:.3g} billion"
    estimate = f"a checkpoint takes about {shown_size(need)} by estimate ({count} parameters)"
    if free < need:
        raise Fault(f"{args.save}: {shown_size(free)} free, {estimate}: expected room for at least one")
    return f"{shown_size(free)} free, {estimate}"


def load_folder(args: Namespace) -> str:
    """What would be loaded is there and can be read."""
    flag, folder = "--load", args.load
    if folder is None or (iteration := _latest(Path(folder), "--load", args.ckpt_step)) is None:
        pretrained = getattr(args, "pretrained_checkpoint", None)
        if pretrained is None:
            return _nothing_to_load(args)
        flag, folder = "--pretrained-checkpoint", pretrained
        iteration = _latest(Path(folder), flag, None)
        if iteration is None:
            raise Fault(f"{flag} {folder}: expected a folder with {TRACKER}")
    step = Path(folder) / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")
    _require_complete(step, f"{flag} {folder}")
    return f"{step.name} of {folder}"


def _nothing_to_load(args: Namespace) -> str:
    if args.load is None:
        raise Skipped("no --load: the weights will be random")
    missing = f"--load {args.load}: no {TRACKER} there"
    if args.exit_on_missing_checkpoint:
        raise Fault(f"{missing}: expected a checkpoint, with --exit-on-missing-checkpoint")
    if args.save is not None and os.path.abspath(args.load) == os.path.abspath(args.save):
        return f"no checkpoint in {args.load} yet: a first start, with random weights"
    raise Doubt(f"{missing}: the job would start from random weights")


def _latest(folder: Path, flag: str, step: int | None) -> str | None:
    """The iteration that the tracker file, or ``--ckpt-step``, names; None without a tracker file."""
    tracker = folder / TRACKER
    try:
        text = tracker.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Fault(f"{flag} {tracker}: {error.strerror}: expected a file that this user can read") from error
    if text != "release" and not text.isdecimal():
        raise Fault(f"{flag} {tracker}: {text[:40]!r}: expected a number of iterations, or release")
    return str(step) if step is not None else text


def _require_complete(step: Path, what: str) -> None:
    """The folder of one checkpoint can be read, and holds all that its metadata list."""
    try:
        for file in sorted(step.iterdir()):
            if file.is_file():
                file.open("rb").close()
    except OSError as error:
        name = error.filename or step
        raise Fault(f"{what}: {name}: {error.strerror}: expected a checkpoint that this user can read") from error
    if (step / "metadata.json").exists() or (step / ".metadata").exists():
        reason = problem(step)
        if reason is not None:
            raise Fault(f"{what}: {step.name} is not complete: {reason}: expected one that was saved to its end")
