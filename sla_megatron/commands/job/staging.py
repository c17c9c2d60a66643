"""Data on a disk of the node's own: what is copied there, and the flags that name the copies.

A copy lies below the folder at the path that its source has, so that every node and every attempt finds the same name
(Megatron's data cache is named after it), and two data sets of one name do not meet.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from ...common.amounts import shown_size
from ...common.files import flush, write_whole
from .data_flags import FILES, PATHS, list_files, prefixes, rewritten, with_prefixes
from .flags import JobError

#: Files that are copied at once, bytes between two looks at what was asked, seconds between two lines.
_AT_ONCE, _CHUNK, _SECONDS = 4, 16 << 20, 10.0


def staged_flags(flags: Sequence[str], stage: Path) -> list[str]:
    """``flags`` with all data below ``stage``, where :func:`stage_data` puts it.  Nothing is read.

    Raises:
        JobError: unless ``stage`` is an absolute path, the same on every node.
    """
    at = _placed(stage)
    groups: list[list[str]] = []
    for word in flags:
        name, equals, value = word.partition("=")
        if equals and name in (*PATHS, *FILES):
            groups.append([name, value])
        elif word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    found: list[str] = []
    for name, *given in groups:
        if name in PATHS:
            given = with_prefixes(given, at)
        elif name in FILES:
            given = [at(file) for file in given]
        found += [name, *given]
    return found


def stage_data(flags: Sequence[str], stage: Path, node: str, say: Callable[[str], None]) -> None:
    """Copy what ``flags`` name as data below ``stage``, but for what is there: of its size and time.

    Safe beside another job that does so on this node; a copy has its name when it is whole.

    Args:
        flags: of the run.
        stage: an absolute path.
        node: what this node is called.
        say: receives lines for the log.

    Raises:
        JobError: for data that is not there, or too little space; nothing is written then.
    """
    at = _placed(stage)
    named = prefixes(flags)
    sources = [source for prefix in named if at(prefix) != prefix for source in _files_of(prefix)]
    lists = {Path(at(file)): rewritten(flag, file, at) for flag, file in list_files(flags).items() if at(file) != file}
    copies = {source: Path(at(str(source))) for source in sources}
    _require_space(copies, stage, node)
    stage.mkdir(parents=True, exist_ok=True)
    with _alone(stage, node, say):
        missing = _require_space(copies, stage, node)
        there = sum(source.stat().st_size for source in copies.keys() - missing.keys())
        say(f"{node}: {shown_size(there)} of data are in {stage}, {shown_size(_bytes(missing))} are to be copied")
        began = time.monotonic()
        _copy_all(missing, node, say)
        for file, text in lists.items():
            if not file.exists() or file.read_text() != text:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, text)
    if missing:
        say(f"{node}: {shown_size(_bytes(missing))} copied in {time.monotonic() - began:.0f} s")


def _placed(stage: Path) -> Callable[[str], str]:
    """Where below ``stage`` a path lies; of object storage, or there already: the path itself."""
    if not stage.is_absolute():
        raise JobError(f"--to {stage}: expected an absolute path, the same on every node")
    stage = Path(os.path.normpath(stage))

    def at(path: str) -> str:
        whole = os.path.abspath(path)
        if "://" in path or Path(whole).is_relative_to(stage):
            return path
        return str(stage / whole.lstrip("/"))

    return at


def _files_of(prefix: str) -> list[Path]:
    """Megatron's two, or the one that ``prefix`` names (conversations, with ``--sft``)."""
    pair = [Path(f"{prefix}.bin").absolute(), Path(f"{prefix}.idx").absolute()]
    if all(path.is_file() for path in pair):
        return pair
    if os.path.isfile(prefix):
        return [Path(prefix).absolute()]
    raise JobError(f"data {prefix}: expected {prefix}.bin and {prefix}.idx, to be copied")


def _require_space(copies: dict[Path, Path], stage: Path, node: str) -> dict[Path, Path]:
    """Those of ``copies`` that are yet to be made; JobError where they do not fit."""
    missing = {source: copy for source, copy in copies.items() if not _same(source, copy)}
    existing = next(folder for folder in (stage, *stage.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if _bytes(missing) > free:
        raise JobError(
            f"--to {stage}: {shown_size(_bytes(missing))} of data are to be copied there, and {shown_size(free)} are "
            f"free on {node}: expected more space, or another folder"
        )
    return missing


def _same(source: Path, copy: Path) -> bool:
    try:
        there = copy.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    wanted = source.stat()
    # Not every file system keeps parts of a second.
    return (there.st_size, int(there.st_mtime)) == (wanted.st_size, int(wanted.st_mtime))


@contextmanager
def _alone(stage: Path, node: str, say: Callable[[str], None]) -> Iterator[None]:
    """Within the block no other job copies to ``stage``; the lock ends with its process, however that ends."""
    with (stage / ".staging").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{node}: waiting for another job that copies to {stage}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy_all(copies: dict[Path, Path], node: str, say: Callable[[str], None]) -> None:
    total, done, failed, counting = _bytes(copies), 0, threading.Event(), threading.Lock()

    def copied(amount: int) -> None:
        nonlocal done
        with counting:
            done += amount
        if failed.is_set():
            raise JobError("another copy failed")

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        under_way = {pool.submit(_copy, source, copy, copied) for source, copy in copies.items()}
        while under_way:
            ended, under_way = wait(under_way, _SECONDS, return_when="FIRST_EXCEPTION")
            fault = next((copy.exception() for copy in ended if copy.exception()), None)
            if fault is not None:
                failed.set()
                raise fault
            if under_way:
                say(f"{node}: {shown_size(done)} of {shown_size(total)} copied")


def _copy(source: Path, copy: Path, copied: Callable[[int], None]) -> None:
    unfinished = copy.with_name(f".{copy.name}.unfinished")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        wanted = source.stat()
        with source.open("rb") as old, unfinished.open("wb") as new:
            while chunk := old.read(_CHUNK):
                new.write(chunk)
                copied(len(chunk))
        if unfinished.stat().st_size != wanted.st_size:
            raise JobError(f"{source}: changed while it was copied")
        os.utime(unfinished, ns=(wanted.st_atime_ns, wanted.st_mtime_ns))
        # What has a name must be there after a power cut as well: the next attempt goes by size and time alone.
        flush(unfinished)
        unfinished.replace(copy)
    except OSError as error:
        raise JobError(f"{source} to {copy}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _bytes(copies: dict[Path, Path]) -> int:
    return sum(source.stat().st_size for source in copies)
