"""The folder of unfinished work: whose it is, what it was begun with, which shards are finished.

PREFIX.sla-data/settings.json   what the shards were made with
PREFIX.sla-data/replaces        there if --overwrite allowed what is made to replace what there is
PREFIX.sla-data/putting         there while the files below are given their names
PREFIX.sla-data/shards/         a record, documents, hashes and faults for each finished shard
PREFIX.sla-data/merged/         what becomes PREFIX.bin and PREFIX.idx
PREFIX.sla-data/plan.json       there if the work is divided among the tasks of sla-data submit: who does what
PREFIX.sla-data/jobs.json       Slurm's numbers of the jobs that were submitted last
PREFIX.sla-data/faults          once a merge was refused for them: the documents that cannot be any
PREFIX.sla-data/tasks/          in place of shards/: a folder like this one for each task, and how the task ended
PREFIX.json                     once all is done: settings, counts, files

What lies at these names and was not made here stays: it is refused, with --overwrite too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.files import read_json, write_json
from ...common.replacing import file_identity
from .errors import DataError, file_errors
from .index_format import MAGIC
from .manifests import WORK_FOLDER, is_work_folder, read_manifest

#: Names of what is made in each folder of unfinished work.
_MADE_IN = {
    "shards": re.compile(r"\.?\d{8}\.[\w.-]+"),
    "merged": re.compile(r".+\.(bin|lengths|pointers|ends|idx)"),
    "tasks": re.compile(r"\.?\d{5}\.(done|error|sla-data\.lock)[\w.-]*"),
    # The first to go is the last that tells what this is.
    ".": re.compile(r"\.?(jobs\.json|plan\.json|settings\.json|replaces|putting|faults)[\w.-]*"),
}


@dataclass(frozen=True)
class Workdir:
    """Where a job with the output prefix ``prefix`` keeps what it has done, and puts ``outputs`` at last."""

    prefix: Path
    outputs: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        return self.prefix.with_name(self.prefix.name + WORK_FOLDER)

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def tasks(self) -> Path:
        return self.folder / "tasks"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def _replaces(self) -> Path:
        return self.folder / "replaces"

    @property
    def _putting(self) -> Path:
        return self.folder / "putting"

    @property
    def manifest(self) -> Path:
        return self.prefix.with_name(self.prefix.name + ".json")

    @property
    def faults(self) -> Path:
        """The documents that were left out, one JSON line each; no file if there is none."""
        return self.prefix.with_name(self.prefix.name + ".faults")

    def require_no_input(self, inputs: Iterable[Path]) -> None:
        """Raise ``DataError`` if one of ``inputs``, by whatever name, is at a name that this job writes to."""
        read = {identity: path for path in inputs if (identity := file_identity(path)) is not None}
        written = [path for output in self.outputs for path in self.files(output.name)]
        written += [self.manifest, self.faults, self._lock]
        for path in [*written, *(path for part in _MADE_IN for path in self._made_in(part))]:
            if (found := read.get(file_identity(path))) is not None:
                raise DataError(
                    f"--output-prefix {self.prefix}: {found} is an input, and {path} would be written: "
                    "expected another --output-prefix"
                )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block, no other process works at this prefix."""
        with file_errors(f"--output-prefix {self.prefix}"):
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            file = self._lock.open("a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(f"--output-prefix {self.prefix}: another sla-data is at work there") from error
            try:
                yield
            finally:
                # One that has content was somebody's before.
                with contextlib.suppress(FileNotFoundError):
                    if not self._lock.stat().st_size:
                        self._lock.unlink()

    @property
    def _lock(self) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}.sla-data.lock")

    def finished(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest, if the job with these settings is finished.

        Raises:
            DataError: if files are in the way that another job, or somebody else, made.
        """
        manifest = self._own_manifest()
        if manifest is None:
            return None
        if self._replaces.exists() and self._begun() is not None:
            # Of what is being replaced, unless that was all but done.
            if _difference(manifest["settings"], settings) is not None:
                return None
        else:
            require_same(self.manifest, manifest["settings"], settings)
        missing = [path for name in manifest["outputs"].values() for path in self.files(name["prefix"])]
        if gone := next((path for path in missing if not path.exists()), None):
            raise DataError(f"{self.manifest} lists {gone}, which is not there: expected it, or --overwrite")
        return manifest

    def goes_on(self, settings: dict[str, Any], overwrite: bool = False, divided: bool = False) -> bool:
        """Whether this job, which may write here, was begun before.  Writes nothing.

        Args:
            overwrite: whether it begins anew, and an earlier one's result may be replaced when this one's is whole.
            divided: whether the work is divided among tasks.

        Raises:
            DataError: if it belongs to a job with other settings, or something is there that nobody here made.
        """
        begun = self._begun()
        goes_on = begun is not None and not overwrite
        if goes_on:
            require_same(self.folder, begun, settings)
            if self.plan.exists() != divided and (self.plan.exists() or self._made_in("shards")):
                command = "sla-data submit" if self.plan.exists() else "sla-data tokenize"
                raise DataError(f"{self.folder} is unfinished work of {command}: expected that, or --overwrite")
        self._require_place(overwrite or (goes_on and self._replaces.exists()))
        return goes_on

    def begin(self, settings: dict[str, Any], overwrite: bool = False, divided: bool = False) -> bool:
        """Make the folder, or find it as this job left it: whether there was something to go on from.

        Arguments and errors are those of :meth:`goes_on`.
        """
        goes_on = self.goes_on(settings, overwrite, divided)
        with file_errors(str(self.folder)):
            if not goes_on:
                self.remove_work()
                self.folder.mkdir(parents=True, exist_ok=True)
                # First of all: by its settings the folder is known as ours, whenever this is ended.
                write_json(self.folder / "settings.json", settings)
                if overwrite:
                    self._replaces.touch()
            for folder in (self.tasks if divided else self.shards, self.merged):
                folder.mkdir(exist_ok=True)
        return goes_on

    def is_put(self) -> bool:
        """Whether all of this job's files, the manifest too, have their names: it was ended before its last breath."""
        return self._putting.exists() and self.manifest.exists()

    def _require_place(self, overwrite: bool) -> None:
        """Raise ``DataError`` for a file at one of this job's names that it may not replace.

        Files of data are an earlier job's output by its manifest, or an unfinished job's that was putting them there;
        others are a data set that the flag names as the output.
        """
        if self._putting.exists():
            return
        manifest = self._own_manifest()
        if manifest is not None and not overwrite:
            raise DataError(f"{self.manifest} exists: expected another --output-prefix, or --overwrite")
        listed = {one["prefix"] for one in manifest["outputs"].values()} if manifest else set()
        for output in self.outputs:
            files = [path for path in self.files(output.name) if os.path.lexists(path)]
            if not files:
                continue
            known = output.name in listed or _is_data_set(output)
            if not (known and all(path.is_file() for path in files)):
                raise DataError(f"{files[0]} exists: expected another --output-prefix, this is no data set")
            if not overwrite:
                raise DataError(f"{files[0]} exists: expected another --output-prefix, or --overwrite")
        left_out = manifest is not None and bool(manifest.get("faults"))
        if os.path.lexists(self.faults) and not (overwrite and left_out):
            raise DataError(f"{self.faults} exists, and is not this job's: expected another --output-prefix")

    def _own_manifest(self) -> dict[str, Any] | None:
        """The manifest of an earlier job; None without one.  Raises ``DataError`` where another file has its name."""
        if not os.path.lexists(self.manifest):
            return None
        content = read_manifest(self.manifest)
        if content is None:
            raise DataError(
                f"{self.manifest} is not sla-data's, whose manifest has that name: expected another --output-prefix"
            )
        return content

    def _begun(self) -> dict[str, Any] | None:
        """What unfinished work was begun with; None without any.  Raises ``DataError`` for somebody else's folder."""
        if is_work_folder(self.folder):
            try:
                return read_json(self.folder / "settings.json")
            except (OSError, ValueError) as error:
                raise DataError(f"{self.folder / 'settings.json'} cannot be read: {error}") from error
        if os.path.lexists(self.folder) and not self._is_bare():
            raise DataError(f"{self.folder} is not sla-data's: expected it to be moved away")
        return None

    def _is_bare(self) -> bool:
        """Whether the folder holds nothing yet but, if its job was ended at once, its settings under another name."""
        made = _MADE_IN["."]
        return self.folder.is_dir() and all(
            made.fullmatch(path.name) and path.name.startswith(".") and path.is_file() for path in self.folder.iterdir()
        )

    def make_room(self) -> None:
        """When the new data are whole: remove the manifest, and the list of faults, that they replace."""
        self._putting.touch()
        self.manifest.unlink(missing_ok=True)
        self.faults.unlink(missing_ok=True)

    def remove_work(self) -> None:
        """Remove unfinished work, its settings last, so that a rest of it is still known as ours; nothing else."""
        for work in self.tasks.glob(f"[0-9]*{WORK_FOLDER}") if is_work_folder(self.folder) else ():
            if is_work_folder(work):
                Workdir(work.with_suffix(""), ()).remove_work()
        for part in _MADE_IN:
            for path in self._made_in(part):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                (self.folder / part).rmdir()

    def _made_in(self, part: str) -> list[Path]:
        folder = self.folder / part
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        made = [path for path in there if _MADE_IN[part].fullmatch(path.name) and not path.is_dir()]
        # In the order of removal: a shard's record, by which it counts as finished, before its data; settings last.
        return sorted(made, key=lambda path: (path.suffix == ".json") == (part == "."))

    def files(self, name: str) -> list[Path]:
        """The two files of the data set ``name`` beside the prefix."""
        return [self.prefix.with_name(name + suffix) for suffix in (".bin", ".idx")]


def _is_data_set(prefix: Path) -> bool:
    """Whether both files are there, the index with Megatron's header."""
    try:
        with Path(f"{prefix}.idx").open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC and Path(f"{prefix}.bin").is_file()
    except OSError:
        return False


def require_same(where: Path, made_with: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    """Raise ``DataError`` that names the first setting that differs."""
    found = _difference(made_with, settings)
    if found is not None:
        name, before, now = found
        raise DataError(
            f"{where} was made with {name} = {before}, not {now}: "
            "expected the same, another --output-prefix, or --overwrite"
        )


def _difference(made_with: dict[str, Any] | None, settings: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs, as it was and as it is."""
    # As JSON gives it back: tuples are lists.
    before, now = _flat(made_with or {}), _flat(json.loads(json.dumps(settings)))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            return name, before.get(name), now.get(name)
    return None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        return {name: value}
    return {key: leaf for k, v in items for key, leaf in _flat(v, f"{name}.{k}" if name else str(k)).items()}
