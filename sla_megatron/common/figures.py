"""Pictures that are there whole or not at all, and the same file for the same figures, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import fault_of_file, written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def fault_of_plot(path: Path, suffixes: tuple[str, ...], overwrite: bool, inputs: Iterable[Path] = ()) -> str | None:
    """What would have to be so for a command that reads ``inputs`` to draw to ``path``; ``None`` if it can."""
    if path.suffix.lower() not in suffixes:
        return f"a file name that ends in {' or '.join(suffixes)}"
    if (expected := fault_of_file(path, overwrite, inputs)) is not None:
        return expected
    return None if find_spec("matplotlib") else "matplotlib to be installed: pip install matplotlib"


def save_figure(figure: Figure, path: Path, salt: str | None = None, **kwargs: Any) -> None:
    """Draw ``figure`` to ``path``, in the format that its name ends in.

    Args:
        figure: of matplotlib.
        path: the file.
        salt: of the names within an SVG, which are made of it and not of chance; ``None``: as matplotlib is set.
        kwargs: of ``Figure.savefig``.
    """
    import matplotlib

    kind = path.suffix.lower()[1:]
    with matplotlib.rc_context({} if salt is None else {"svg.hashsalt": salt}), written_whole(path) as unfinished:
        figure.savefig(unfinished, format=kind, metadata={"Date": None} if kind == "svg" else None, **kwargs)
