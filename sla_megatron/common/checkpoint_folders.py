"""Which checkpoints of a ``--save`` folder are complete, and Megatron's tracker file.

Upstream (``megatron/training/checkpointing.py``) believes the tracker file: without it training starts from random
weights, with a broken one it ends with status 0, and it does not look for an older checkpoint.  Here the files decide.
Only the standard library is imported, so that a launcher may ask on a machine without torch.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import write_whole

TRACKER = "latest_checkpointed_iteration.txt"


class _Stored:
    """Stands in for every class of torch in a checkpoint's metadata: its arguments or attributes, and no code."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def _ignore(self, *arguments: Any) -> None:
        pass

    # Of those that are containers.
    __setitem__ = append = extend = add = update = _ignore


class StandIns(pickle.Unpickler):
    """Reads what torch pickled without torch, and without running anything of it."""

    def find_class(self, module: str, name: str) -> Any:
        del module, name
        return _Stored

    def persistent_load(self, pid: Any) -> Any:
        """A tensor's storage."""
        return pid


def problem(folder: Path) -> str | None:
    """Why the checkpoint in ``folder`` (one ``iter_*``) is not complete; None if it is.

    ``.metadata`` is written after all tensors and lists where each of them lies: every file must reach so far.
    """
    if not folder.is_dir():
        return "it is not there"
    for name in (".metadata", "metadata.json"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        json.loads((folder / "metadata.json").read_text())
        with (folder / ".metadata").open("rb") as file:
            places = StandIns(file).load().storage_data.values()
        ends: dict[str, int] = {}
        for place in places:
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    except Exception as error:  # A pickle that is cut off raises what it likes.
        return f".metadata or metadata.json cannot be read ({type(error).__name__})"
    for name, end in ends.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < end:
            return f"{name} ends at byte {file.stat().st_size}, its tensors at {end}"
    return None


def stored_args(folder: Path) -> dict[str, Any]:
    """Megatron's arguments of the run that wrote the checkpoint in ``folder``, by name, and the ``iteration`` that one
    goes on from; empty where they cannot be read.

    Values of other than Python's own types are stand-ins.
    """
    try:
        common = common_state(folder, StandIns)
        return vars(common["args"]) | {"iteration": common["iteration"]}
    except Exception:  # As above; and a pickle of another version may hold anything.
        return {}


def common_state(folder: Path, unpickler: type[pickle.Unpickler]) -> Any:
    """What Megatron stored beside the tensors of the checkpoint in ``folder``, as ``unpickler`` reads it.

    One object among the shards, in earlier versions a file (``megatron/core/dist_checkpointing/serialization.py``).
    Raises whatever a damaged file, or another version's, leads to.
    """
    if (folder / "common.pt").is_file():
        return _unzipped((folder / "common.pt").read_bytes(), unpickler)
    with (folder / ".metadata").open("rb") as file:
        places = StandIns(file).load().storage_data.items()
    place = next(place for index, place in places if index.fqn == "common_state/shard_0_1")
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        (common,) = _unzipped(file.read(place.length), unpickler)
    return common


def _unzipped(saved: bytes, unpickler: type[pickle.Unpickler]) -> Any:
    """What ``torch.save`` made ``saved`` of."""
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return unpickler(io.BytesIO(archive.read(name))).load()


def checkpoints(folder: Path) -> dict[int, Path]:
    """Folders named ``iter_*`` by iteration, the newest first."""
    found = {int(path.name[5:]): path for path in folder.glob("iter_*") if path.name[5:].isdecimal() and path.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def tracked(folder: Path) -> int | str | None:
    """What the tracker file says: an iteration, its text if that is none, None without a file."""
    try:
        text = (folder / TRACKER).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdecimal() else text


def newest_complete(
    folder: Path, known: Callable[[Path], str | None] = lambda path: None
) -> tuple[int | None, dict[Path, str]]:
    """The iteration of the newest complete checkpoint, and why each newer one is not complete.

    Args:
        folder: of ``--save``.
        known: what is known to be wrong with a complete one, None for nothing.
    """
    broken = {}
    for iteration, path in checkpoints(folder).items():
        reason = problem(path) or known(path)
        if reason is None:
            return iteration, broken
        broken[path] = reason
    return None, broken


def aside(path: Path, what: str) -> str:
    """Rename a checkpoint, or another file, so that nothing takes it for one; its new name begins with ``what``."""
    name = f"{what}_{path.name}_{time.strftime('%Y%m%dT%H%M%S')}_{os.getpid()}"
    while path.with_name(name).exists():
        name += "_again"
    return path.rename(path.with_name(name)).name


def point_to(folder: Path, iteration: int, broken: dict[Path, str], say: Callable[[str], None]) -> None:
    """Have Megatron resume from ``iteration``: ``broken`` checkpoints are moved aside, not removed."""
    for path, reason in broken.items():
        complete = problem(path) is None
        name = aside(path, "damaged" if complete else "incomplete")
        say(f"{path} is {'damaged' if complete else 'not complete'}: {reason}; it is now {name}")
    said = tracked(folder)
    if said != iteration:
        write_whole(folder / TRACKER, str(iteration))
        shown = "was missing" if said is None else f"said {said!r}"
        say(f"{folder / TRACKER} {shown}: it now says {iteration}, the newest complete checkpoint")
