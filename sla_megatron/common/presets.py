"""Presets of flags, as the launchers read them: ``launch/presets.sh`` is the one reader, and this asks it."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from .errors import StartError

_READER = Path(__file__).resolve().parents[2] / "launch" / "presets.sh"


@cache
def preset_flags(names: str) -> tuple[str, ...]:
    """The arguments of presets, parted by spaces: names as in launch/presets, or paths of files.

    Raises :class:`StartError` for a preset that there is not, or where this is not the repository.
    """
    if not names:
        return ()
    if not _READER.is_file():
        raise StartError(f"presets: {names}: expected launch/ beside sla_megatron, as in the repository")
    done = subprocess.run(["sh", str(_READER), names], capture_output=True, text=True)
    if done.returncode:
        raise StartError(done.stderr.strip().removeprefix("sla-megatron: error: ").replace("PRESETS", "presets"))
    return tuple(done.stdout.splitlines())
