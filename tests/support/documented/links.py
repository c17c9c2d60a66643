"""Whether links, anchors and pictures lead somewhere; those out of the repository are looked at, not asked."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from .markdown import anchors, markdown_files, pieces

_ELSEWHERE = re.compile(r"https?://[a-z0-9.-]+\.[a-z]{2,}(/[^\s<>\"]*)?")


def dead_links(root: Path) -> list[str]:
    """Of every markdown file of ``root``."""
    faults = []
    for page in markdown_files(root):
        for piece in pieces(page.read_text()):
            if piece.kind in ("link", "image") and (fault := _fault(root, page, piece.text)):
                faults.append(f"{page.relative_to(root)}:{piece.line}: {piece.text}: {fault}")
    return faults


def _fault(root: Path, page: Path, target: str) -> str | None:
    if re.match("[a-z]+:", target):
        return None if _ELSEWHERE.fullmatch(target) else "expected https://HOST/PATH"
    name, _, anchor = target.partition("#")
    path = (page.parent / unquote(name)).resolve() if name else page
    if not path.is_relative_to(root.resolve()):
        return "expected a path within the repository"
    if not path.exists():
        return "there is no such file"
    if anchor and (path.suffix != ".md" or anchor not in anchors(path.read_text())):
        return f"there is no heading of {path.relative_to(root.resolve())} with that anchor"
    return None
