"""The pages as a site, built by mkdocs; what it warns of are faults."""

from __future__ import annotations

import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort, BuildError

from .markdown import as_html, markdown_files

#: What a reader sees a page by.
SHAPE = ("h1", "h2", "h3", "h4", "li", "pre", "table", "td", "img")


class _Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"site: {record.getMessage()}")


def build_site(root: Path, out: Path, **settings: Any) -> list[str]:
    """Of ``root/mkdocs.yml`` into ``out``, with ``settings`` in the place of the file's: what was warned of.

    The site is whole where nothing was.
    """
    # Said where the theme is imported, and of no use to those who read the site.
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    kept, logger = _Kept(), logging.getLogger("mkdocs")
    logger.addHandler(kept)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            # All faults are wanted, where strict would end at a stage's.
            config = load_config(str(root / "mkdocs.yml"), site_dir=str(out), strict=False, **settings)
            config.plugins.on_startup(command="build", dirty=False)
            try:
                build(config)
            except (Abort, BuildError) as error:
                kept.lines.append(f"site: {error}")
            finally:
                config.plugins.on_shutdown()
    finally:
        logger.removeHandler(kept)
    return [*kept.lines, *(f"site: {warning.message}" for warning in warned)]


def own_pages(root: Path) -> list[Path]:
    """The markdown files of ``root`` that are pages: not the notes on test data."""
    return [page for page in markdown_files(root) if not page.is_relative_to(root / "tests")]


def in_site(root: Path, site: Path, page: Path) -> Path:
    """Where ``site`` has a page of ``root``."""
    place = site / page.relative_to(root)
    return place.with_name("index.html") if page.name == "README.md" else place.with_suffix(".html")


def misread_pages(root: Path, site: Path) -> list[str]:
    """Pages that the site shows otherwise than a view of the repository: markdown is read in more ways than one."""
    faults = []
    for page in own_pages(root):
        # What mkdocstrings fills in is in the site alone.
        if page.name != "api.md":
            article = in_site(root, site, page).read_text().partition("<article")[2].partition("</article>")[0]
            view = as_html(page.read_text())
            for tag in SHAPE:
                expected, found = (len(re.findall(rf"<{tag}\b", html)) for html in (view, article))
                if expected != found:
                    name = page.relative_to(root)
                    faults.append(f"{name}: {expected} {tag} in a view of the repository, {found} in the site")
    return faults
