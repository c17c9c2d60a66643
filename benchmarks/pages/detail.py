"""A page of ``docs/results``: every file of its benchmarks, with where it was measured, tables and pictures."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from pathlib import Path

from ..record import Table
from .evidence import Result, is_on_gpu, origin
from .sections import Section, Theme

HEAD = """\
# Results: {title}

Written by `python -m benchmarks.results_page` from the files that it links to; [results](../results.md) sums up, and
[benchmarks](../benchmarks.md) says what each command measures. A figure is a median with its spread in brackets, or as
its table says.
"""


def page(theme: Theme, files: dict[Path, Result], folder: Path) -> str:
    """The text of ``theme``, with links for a page in ``folder``."""
    parts = [HEAD.format(title=theme.title)]
    for section in theme.sections:
        parts += [f"## {section.title}\n", section.text + "\n"]
        own = of_benchmark(section.name, files)
        for path, result in own.items():
            parts += _measured(section, path, result, folder, pictures(path, files))
        if all(map(is_on_gpu, own.values())):
            parts.append(f"On a CPU: not measured. `{section.command}`\n")
        if section.on_gpu and not any(map(is_on_gpu, own.values())):
            parts.append(f"On a GPU: not measured. `{section.on_gpu}`\n")
    return "\n".join(parts)


def of_benchmark(name: str, files: dict[Path, Result]) -> dict[Path, Result]:
    """Those of ``files`` whose names begin with ``name``."""
    return {path: result for path, result in files.items() if path.stem.split("-")[0] == name}


def pictures(path: Path, files: Iterable[Path]) -> list[Path]:
    """The pictures of ``path``: those whose name begins with its own, and with no other file's longer one."""
    longer = [other.stem for other in files if other.stem.startswith(path.stem) and other != path]
    found = sorted(path.parent.glob(f"{path.stem}*.svg"))
    return [plot for plot in found if not any(plot.stem.startswith(stem) for stem in longer)]


def link(path: Path, folder: Path) -> str:
    """``path`` as a page in ``folder`` names it."""
    return os.path.relpath(path, folder)


def _measured(section: Section, path: Path, result: Result, folder: Path, plots: Iterable[Path]) -> list[str]:
    """One file's part: where and how, tables, plots."""
    tables: list[Table] = importlib.import_module(section.module).tables(result)
    return [
        f"`{result['command']}`\n",
        f"{origin(result)}; [{path.name}]({link(path, folder)})\n",
        *(table.as_markdown() for table in tables),
        *(f"![{plot.stem}]({link(plot, folder)})\n" for plot in plots),
    ]
