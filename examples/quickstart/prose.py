"""Text in English that every environment of this project has: what its packages say of themselves.

One document is one source file: the paragraphs of its docstrings that read as prose, each once in the whole text.  The
order is that of :mod:`examples.quickstart.corpus`: a fixed shuffle by name.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from examples.quickstart.corpus import FILE_BYTES, SPACE_MARK, CorpusError, shuffled
from sla_megatron.common.waiting import bar

#: With the longest docstrings; all come with what the project needs.
PACKAGES = ("torch", "transformers", "numpy", "pandas", "networkx", "sympy", "huggingface_hub", "datasets", "megatron")

#: Shorter ones are mostly headings and one-line summaries.
SHORTEST = 120
#: The share of a paragraph's words that are plain words: less are tables, signatures and code.
PLAIN_SHARE = 0.85
PLAIN_WORD = re.compile(r"""["'(]?[A-Za-z][a-z'’-]*[.,;:!?)"']*|[aAI]""")
CODE_MARKS = (">>>", "::", "|", "```", SPACE_MARK)


def read_documents(max_bytes: int, root: Path | None = None) -> list[str]:
    """Prose of whole files in the fixed order until the next one would exceed ``max_bytes`` of UTF-8 text in total.

    ``root`` defaults to the folder of the running Python's installed packages.  Raises CorpusError when fewer than 20
    documents are found.
    """
    root = root or Path(sysconfig.get_paths()["purelib"])
    files = [path for name in PACKAGES for path in (root / name).rglob("*.py") if path.stat().st_size in FILE_BYTES]
    documents: list[str] = []
    total, seen = 0, set[str]()
    # Some hundred seconds for 8 MB: most files have little prose.
    with bar("prose", max_bytes, leave=False) as drawn:
        for path in shuffled(files, root):
            document = "\n\n".join(_new_paragraphs(path, seen))
            if not document:
                continue
            total += len(document.encode())
            if total > max_bytes:
                break
            documents.append(document)
            drawn.n = total
    if len(documents) < 20:
        raise CorpusError(f"only {len(documents)} files with prose within {max_bytes} bytes in {root}")
    return documents


def _new_paragraphs(path: Path, seen: set[str]) -> Iterator[str]:
    for docstring in _docstrings(path):
        for paragraph in re.split(r"\n\s*\n", docstring):
            words = paragraph.split()
            text = " ".join(words)
            if text not in seen and is_prose(text, words):
                seen.add(text)
                yield text


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (UnicodeDecodeError, SyntaxError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def is_prose(text: str, words: list[str]) -> bool:
    """Whether ``text`` of ``words`` is sentences rather than code, a table or a heading."""
    if len(text) < SHORTEST or text[-1] not in ".!?:)" or any(mark in text for mark in CODE_MARKS):
        return False
    return sum(PLAIN_WORD.fullmatch(word) is not None for word in words) >= PLAIN_SHARE * len(words)
