"""A Megatron-LM checkout: its version, the patch that is for it, and whether that is applied."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...common.errors import StartError
from ...upstream.megatron_version import SUPPORTED, VERSION_FILE, minor_of, version_in
from .diff import Diff, DiffError

#: What every patch changes.
SCRIPT = "pretrain_gpt.py"

#: Beside this file, where a wheel has them, or in the project's own checkout.
_FOLDERS = (Path(__file__).parent / "patches", Path(__file__).parents[3] / "patches")


class PatchError(StartError):
    """A checkout that cannot be patched: one line that names the file and what was expected."""


@dataclass(frozen=True)
class Patch:
    """A file of ``patches/``, and the minor versions of Megatron that it is for."""

    name: str
    minors: tuple[str, ...]

    @cached_property
    def diff(self) -> Diff:
        """What it changes.  Raises :class:`PatchError` if the file is not there."""
        for folder in _FOLDERS:
            if (folder / self.name).is_file():
                return Diff.parse((folder / self.name).read_text())
        raise PatchError(f"{_FOLDERS[-1] / self.name} is missing: install sla-megatron from its own checkout")


PATCHES = (Patch("core_v0.19.0.patch", ("0.19", "0.20")),)


@dataclass(frozen=True)
class Checkout:
    """``folder`` holds ``pretrain_gpt.py`` and ``megatron/core``."""

    folder: Path

    @property
    def script(self) -> Path:
        """The file that is patched."""
        return self.folder / SCRIPT

    @cached_property
    def version(self) -> str:
        """Such as ``"0.19.1"``.  Raises :class:`PatchError` if this is no checkout, or of a version without a patch."""
        path = self.folder / VERSION_FILE
        found = _checked(path, version_in)
        if found is None:
            raise PatchError(f"{path}: no version, expected MAJOR, MINOR and PATCH of Megatron")
        if not any(minor_of(found) in patch.minors for patch in PATCHES):
            raise PatchError(f"{path}: Megatron {found}, supported: {SUPPORTED}")
        return found

    def require_megatron(self) -> None:
        """Raise :class:`PatchError` unless there is a Megatron, of any version."""
        _checked(self.folder / VERSION_FILE, version_in)

    @property
    def patch(self) -> Patch:
        """The one for its version."""
        return next(patch for patch in PATCHES if minor_of(self.version) in patch.minors)

    def is_applied(self) -> bool:
        """Raises :class:`PatchError` if the patch neither is applied nor fits."""
        text, diff = self._text(), self.patch.diff
        if diff.reversed().fits(text):
            return True
        self._changed(diff, text)
        return False

    def apply(self) -> bool:
        """Apply the patch; ``False`` if it was applied already.  Raises :class:`PatchError`, with nothing changed."""
        if self.is_applied():
            return False
        self._write(self._changed(self.patch.diff, self._text()))
        return True

    def revert(self) -> bool:
        """Take the patch back; ``False`` if it was not applied.  Raises :class:`PatchError`, with nothing changed."""
        if not self.is_applied():
            return False
        self._write(self._changed(self.patch.diff.reversed(), self._text()))
        return True

    def _text(self) -> str:
        return _checked(self.script, lambda path: path.read_bytes().decode())

    def _changed(self, diff: Diff, text: str) -> str:
        try:
            return diff.apply(text)
        except DiffError as error:
            raise PatchError(
                f"{self.script}: changed where the patch for Megatron {self.version} goes, expected, once: {error}"
            ) from error

    def _write(self, text: str) -> None:
        """In one step: the file is the old one or the new one, whatever happens.  A link stays a link."""
        path = self.script.resolve()
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{SCRIPT}.", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(text.encode())
                shutil.copymode(path, name)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            raise PatchError(f"{path}: cannot be written ({error.strerror})") from error


def _checked[T](path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except OSError as error:
        raise PatchError(f"{path}: {error.strerror}, expected a file of a Megatron-LM checkout") from error
    except UnicodeDecodeError as error:
        raise PatchError(f"{path}: not UTF-8, expected a Python script of Megatron-LM") from error
