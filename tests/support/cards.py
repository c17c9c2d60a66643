"""Cards of workflows: what a test found, with versions and digests of the code that it covers.

A test leaves its card with the fixture ``card``, where ``SLA_CARDS`` names a folder (``make cards``); without, nothing
is written.  ``cards_page`` makes the pages of docs/cards of what lies there.
"""

from __future__ import annotations

import ast
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sla_megatron.common.environment import commit, machine
from sla_megatron.common.files import read_json, write_json

from .launch import ROOT
from .workflows import WORKFLOWS

#: Where cards lie, from the root; the variable of the environment that has a test leave one, with a folder as value.
CARDS, VARIABLE = "docs/cards", "SLA_CARDS"

#: What lies in a covered folder and is no code.
_NO_CODE = (".md", ".svg", ".pyc")

Results = dict[str, Any]


def leave(node: str, folder: str | None, name: str, command: str, results: Results | Callable[[], Results]) -> None:
    """What the test ``node`` found of the workflow ``name``, as a card in ``folder``.

    Nothing without a folder, and of parameters that are not the card's; a function of ``results`` is not called then.
    """
    if not folder or WORKFLOWS[name].test != node:
        return
    card = {
        "workflow": name,
        "test": node,
        "command": command,
        "results": results() if callable(results) else results,
        # These tests run on the CPU, wherever they run.
        "machine": machine("cpu") | _versions(WORKFLOWS[name].packages),
        "commit": commit(ROOT),
        "date": time.strftime("%Y-%m-%d"),
        "covers": digests(WORKFLOWS[name].covers),
    }
    write_json(Path(folder) / f"{name}.json", card)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The cards that lie in ``folder``, in the order of :data:`WORKFLOWS`."""
    found = {name: read_json(folder / f"{name}.json") for name in WORKFLOWS}
    return {name: card for name, card in found.items() if card is not None}


def faults(folder: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with the cards in ``folder`` beside the files of ``root``: a line for each file and each card."""
    cards = read(folder)
    found = [f"workflow {name} has no card: make cards" for name in WORKFLOWS if name not in cards]
    found += [f"card {path.stem} is of no workflow" for path in folder.glob("*.json") if path.stem not in WORKFLOWS]
    for name, card in cards.items():
        now, then = digests(WORKFLOWS[name].covers, root), card.get("covers")
        if then is None:
            continue
        changed = sorted(path for path in {*now, *then} if now.get(path) != then.get(path))
        found += [f"card {name} is older than {path}: make cards" for path in changed]
        if card["test"] != WORKFLOWS[name].test:
            found.append(f"card {name} is of {card['test']}: make cards")
    return found


def digests(covers: Sequence[str], root: Path = ROOT) -> dict[str, str]:
    """File -> digest of its meaning, of all files of ``covers`` in ``root``."""
    files = [file for each in covers for file in _files(root / each)]
    return {file.relative_to(root).as_posix(): digest(file) for file in sorted(files)}


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []
    inside = [file for file in path.rglob("*") if file.is_file() and file.suffix not in _NO_CODE]
    return [file for file in inside if not file.name.startswith(".")]


def digest(path: Path) -> str:
    """12 digits; of Python the same whatever comments, docstrings and line breaks there are."""
    return _digest(path.read_bytes(), path.suffix == ".py")


@cache
def _digest(content: bytes, is_python: bool) -> str:
    meaning = repr(_plain(ast.parse(content))).encode() if is_python else content
    return hashlib.sha256(meaning).hexdigest()[:12]


def _plain(node: Any) -> Any:
    """A syntax tree as lists, without what is empty: Python's own text of it is another one in each version."""
    if isinstance(node, list):
        return [_plain(each) for each in node if not _is_docstring(each)]
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _plain(value)) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return [type(node).__name__, *fields]


def _is_docstring(node: Any) -> bool:
    """A string that stands alone, which does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
