"""A Megatron-LM checkout: its line of development, the patch that is for it, and whether that is applied."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...common.errors import StartError
from ...upstream.flavours import Flavour, flavour_of
from ...upstream.megatron_version import VERSION_FILE, version_in
from ...upstream.seams import SeamError
from .diff import Diff, DiffError

#: Beside this file, where a wheel has them, or in the project's own checkout.
_FOLDERS = (Path(__file__).parent / "patches", Path(__file__).parents[3] / "patches")


class PatchError(StartError):
    """A checkout that cannot be patched: one line that names the file and what was expected."""


@dataclass(frozen=True)
class Patch:
    """A file of ``patches/``, and the lines of development that it is for."""

    name: str
    flavours: tuple[str, ...]

    @cached_property
    def diffs(self) -> tuple[Diff, ...]:
        """What it changes, script by script.  Raises :class:`PatchError` if the file is not there."""
        for folder in _FOLDERS:
            if (folder / self.name).is_file():
                return Diff.parse((folder / self.name).read_text())
        raise PatchError(f"{_FOLDERS[-1] / self.name} is missing: install sla-megatron from its own checkout")


PATCHES = (Patch("core_v0.19.0.patch", ("0.19", "0.20")), Patch("dev.patch", ("dev",)))


@dataclass(frozen=True)
class Checkout:
    """``folder`` holds ``pretrain_gpt.py``, ``pretrain_hybrid.py`` and ``megatron/core``."""

    folder: Path

    @cached_property
    def version(self) -> str:
        """Such as ``"0.19.1"``.  Raises :class:`PatchError` if this is no checkout."""
        path = self.folder / VERSION_FILE
        found = _checked(path, version_in)
        if found is None:
            raise PatchError(f"{path}: no version, expected MAJOR, MINOR and PATCH of Megatron")
        return found

    @cached_property
    def flavour(self) -> Flavour:
        """Its line of development.  Raises :class:`PatchError` for one without a patch."""
        path = self.folder / VERSION_FILE
        try:
            return flavour_of(self.version, path.parent)
        except SeamError as error:
            raise PatchError(f"{path}: {error}") from error
        except OSError as error:
            raise _not_there(error) from error

    @property
    def description(self) -> str:
        """Which Megatron this is, for messages."""
        return f"Megatron {self.flavour.described(self.version)}"

    def require_megatron(self) -> None:
        """Raise :class:`PatchError` unless there is a Megatron, of any version."""
        _checked(self.folder / VERSION_FILE, version_in)

    @property
    def patch(self) -> Patch:
        """The one for its line of development."""
        return next(patch for patch in PATCHES if self.flavour.name in patch.flavours)

    def script(self, diff: Diff) -> Path:
        """The file that ``diff`` changes."""
        return self.folder / diff.path

    def applied(self) -> list[Diff]:
        """The part of the patch that is applied.  Raises :class:`PatchError` if one neither is nor fits."""
        found = []
        for diff in self.patch.diffs:
            text = self._text(diff)
            if diff.reversed().fits(text):
                found.append(diff)
            else:
                self._changed(diff, text)
        return found

    def apply(self) -> list[Diff]:
        """Apply the rest of the patch: what was done.  Raises :class:`PatchError`, with nothing changed."""
        applied = self.applied()
        return self._change([diff for diff in self.patch.diffs if diff not in applied])

    def revert(self) -> list[Diff]:
        """Take back what is applied: what was done.  Raises :class:`PatchError`, with nothing changed."""
        return self._change([diff.reversed() for diff in self.applied()])

    def _change(self, diffs: list[Diff]) -> list[Diff]:
        _write({self.script(diff).resolve(): self._changed(diff, self._text(diff)) for diff in diffs})
        return diffs

    def _text(self, diff: Diff) -> str:
        return _checked(self.script(diff), lambda path: path.read_bytes().decode())

    def _changed(self, diff: Diff, text: str) -> str:
        try:
            return diff.apply(text)
        except DiffError as error:
            raise PatchError(
                f"{self.script(diff)}: changed where the patch for {self.description} goes, expected, once: {error}"
            ) from error


def _write(texts: dict[Path, str]) -> None:
    """Each file in one step: it is the old one or the new one, whatever happens.  A link stays one: paths are resolved.

    All are written beside the old ones before the first takes its place.
    """
    made: list[tuple[str, Path]] = []
    try:
        for path, text in texts.items():
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            made.append((name, path))
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode())
            shutil.copymode(path, name)
        for name, path in made:
            os.replace(name, path)
    except OSError as error:
        raise PatchError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        for name, _ in made:
            Path(name).unlink(missing_ok=True)


def _checked[T](path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except OSError as error:
        raise _not_there(error) from error
    except UnicodeDecodeError as error:
        raise PatchError(f"{path}: not UTF-8, expected a Python script of Megatron-LM") from error


def _not_there(error: OSError) -> PatchError:
    return PatchError(f"{error.filename}: {error.strerror}, expected a file of a Megatron-LM checkout")
