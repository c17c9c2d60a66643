"""Every markdown file of the repository, read as git's views read it (CommonMark, with tables)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

#: Folders that are made, not kept.
_MADE = {"build", "dist", "runs"}

_READER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Piece:
    """A part of a page: ``kind`` is ``link``, ``image``, ``heading``, ``code`` or the language of a fenced block."""

    kind: str
    text: str
    line: int


def markdown_files(root: Path) -> list[Path]:
    """Those below ``root``, sorted; not of environments, hidden folders, and what ``make`` makes."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _MADE]
        found += [Path(folder) / name for name in files if name.endswith(".md")]
    return sorted(found)


@cache
def pieces(text: str) -> tuple[Piece, ...]:
    """Of a page, in order; a heading as the text that it shows, a link as its target."""
    return tuple(_pieces(_READER.parse(text)))


def as_html(text: str) -> str:
    """A page as a view of the repository shows it."""
    return _READER.render(text)


def _pieces(tokens: list[Token]) -> Iterator[Piece]:
    line = 1
    for number, token in enumerate(tokens):
        # Cells of a table have no line of their own in every case: it is their row's.
        line = token.map[0] + 1 if token.map else line
        if token.type == "fence":
            # What is within begins a line further down.
            yield Piece(f"```{token.info.strip()}", token.content, line + 1)
        elif token.type == "inline":
            if tokens[number - 1].type == "heading_open":
                shown = (inner.content for inner in token.children if inner.type in ("text", "code_inline"))
                yield Piece("heading", "".join(shown), line)
            for inner in token.children:
                if inner.type == "link_open":
                    yield Piece("link", str(inner.attrs["href"]), line)
                elif inner.type == "image":
                    yield Piece("image", str(inner.attrs["src"]), line)
                elif inner.type == "code_inline":
                    yield Piece("code", inner.content, line)


def anchors(text: str) -> set[str]:
    """Those that a view of the repository gives the headings of a page."""
    found: set[str] = set()
    for piece in pieces(text):
        if piece.kind == "heading":
            slug = re.sub(r"[^\w -]", "", piece.text.lower()).replace(" ", "-")
            number = 0
            while (anchor := f"{slug}-{number}" if number else slug) in found:
                number += 1
            found.add(anchor)
    return found
