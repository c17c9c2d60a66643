"""The folder of unfinished work: whose it is, what it was begun with, which shards are finished.

PREFIX.sla-data/settings.json   what the shards were made with
PREFIX.sla-data/shards/         a record, documents, hashes and faults for each finished shard
PREFIX.json                     once all is done: settings, counts, files
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.files import read_json, write_json
from .errors import DataError, file_errors


@dataclass(frozen=True)
class Workdir:
    """Where a job with the output prefix ``prefix`` keeps what it has done."""

    prefix: Path

    @property
    def folder(self) -> Path:
        return self.prefix.with_name(self.prefix.name + ".sla-data")

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def manifest(self) -> Path:
        return self.prefix.with_name(self.prefix.name + ".json")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block, no other process works at this prefix."""
        lock = self.prefix.with_name(f".{self.prefix.name}.sla-data.lock")
        with file_errors(f"--output-prefix {self.prefix}"):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(f"--output-prefix {self.prefix}: another sla-data is at work there") from error
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    def finished(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest, if the job with these settings is finished.

        Raises:
            DataError: if files are in the way that another job, or somebody else, made.
        """
        manifest = _read(self.manifest)
        if manifest is not None:
            _require_same(self.manifest, manifest.get("settings"), settings)
            missing = [path for name in manifest["outputs"].values() for path in self.files(name["prefix"])]
            if gone := next((path for path in missing if not path.exists()), None):
                raise DataError(f"{self.manifest} lists {gone}, which is not there: expected it, or --overwrite")
            return manifest
        return None

    def begin(self, settings: dict[str, Any], outputs: list[Path]) -> bool:
        """Make the folder, or find it as this job left it: whether there was something to go on from.

        Raises:
            DataError: if it belongs to a job with other settings, or ``outputs`` exist that nobody here made.
        """
        begun = _read(self.folder / "settings.json")
        if begun is not None:
            _require_same(self.folder, begun, settings)
            return True
        if self.folder.exists() and any(self.folder.iterdir()):
            raise DataError(f"{self.folder} is not sla-data's: expected it to be moved away")
        for path in [file for output in outputs for file in self.files(output.name)]:
            if path.exists():
                raise DataError(f"{path} exists: expected another --output-prefix, or --overwrite")
        with file_errors(str(self.folder)):
            self.shards.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "settings.json", settings)
        return False

    def clear(self, outputs: list[Path]) -> None:
        """Remove unfinished work, the manifest and ``outputs``."""
        self.remove_work()
        self.manifest.unlink(missing_ok=True)
        for output in outputs:
            for path in self.files(output.name):
                path.unlink(missing_ok=True)

    def remove_work(self) -> None:
        """Remove the folder; its settings last, so that a rest of it is still known as ours."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.shards)
        shutil.rmtree(self.folder, ignore_errors=True)

    def files(self, name: str) -> list[Path]:
        """The two files of the data set ``name`` beside the prefix."""
        return [self.prefix.with_name(name + suffix) for suffix in (".bin", ".idx")]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _require_same(where: Path, made_with: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    """Raise ``DataError`` that names the first setting that differs."""
    # As JSON gives it back: tuples are lists.
    before, now = _flat(made_with or {}), _flat(json.loads(json.dumps(settings)))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise DataError(
                f"{where} was made with {name} = {before.get(name)}, not {now.get(name)}: "
                "expected the same, another --output-prefix, or --overwrite"
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        return {name: value}
    return {key: leaf for k, v in items for key, leaf in _flat(v, f"{name}.{k}" if name else str(k)).items()}
