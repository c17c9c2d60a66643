"""The pages as a site, built by mkdocs; what it warns of are faults."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

# Said where a theme is imported, and of no use to those who read the site.
os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort, BuildError


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
