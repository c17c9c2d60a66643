"""Write ``docs/cards/*.md`` from the JSON files that lie beside them, and from nothing else.

    python -m tests.support.cards_page            # writes them
    python -m tests.support.cards_page --check    # ends with status 1 where they are not what the files say

What a card is, is in ``cards``; which there are, in ``workflows``.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sla_megatron.common.files import write_whole

from . import cards
from .launch import ROOT

Card = dict[str, Any]

INDEX = """\
# Cards

A card says that a workflow ran: which command, with which versions, on what machine, and what came out. The test that
runs the workflow writes it, after all that it asserts, as a JSON file; the pages are made of these files alone.

A card covers files. It keeps a digest of each, and a test fails where one is no longer what it was, and names it.
Comments, docstrings and line breaks of Python do not count.

`make cards` runs all of these tests anew, and `make cards CARDS="pipeline sweep"` these two. What cannot run on a
machine, vLLM or Slurm say, is named, and its card stays as it was. A card that was never written says "not run", and
why. All ran on the CPU: what a GPU computes is in [results](../results.md).

| workflow | ran on | commit | what came out, first of all |
| :-- | :-- | :-- | :-- |
"""

#: What is in ``machine`` beside versions.
_MACHINE = ("device", "processor", "cores", "threads")


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / cards.CARDS, help="with the JSON files")
    parser.add_argument("--check", action="store_true", help="compare with what is there, write nothing")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: expected a folder of JSON files")
    wrong = differing(args.folder)
    if args.check and wrong:
        sys.exit(f"{', '.join(wrong)} of {args.folder}: not what its files say: run python -m tests.support.cards_page")
    elif not args.check:
        for name, text in pages(args.folder).items():
            write_whole(args.folder / name, text)
        for name in differing(args.folder):
            (args.folder / name).unlink()
        print("written:", args.folder)


def differing(folder: Path) -> list[str]:
    """Names of the pages in ``folder`` that are not what its JSON files say, or are of none."""
    expected = pages(folder)
    there = {path.name: path.read_text() for path in folder.glob("*.md")}
    return sorted(name for name in {*expected, *there} if there.get(name) != expected.get(name))


def pages(folder: Path) -> dict[str, str]:
    """Name -> text of each page."""
    found = cards.read(folder)
    rows = [_row(name, card) for name, card in found.items()]
    return {"index.md": INDEX + "".join(rows)} | {f"{name}.md": _page(name, card) for name, card in found.items()}


def _row(name: str, card: Card) -> str:
    link = f"[{cards.WORKFLOWS[name].title}]({name}.md)"
    if "not_run" in card:
        return f"| {link} | not run | | {card['not_run']} |\n"
    what, value = next(iter(card["results"].items()))
    return f"| {link} | {card['date']} | {card['commit']} | {what}: {_shown(value)} |\n"


def _page(name: str, card: Card) -> str:
    workflow = cards.WORKFLOWS[name]
    head = f"# {workflow.title}\n\n{_wrapped(f'{workflow.text} [How it is used]({workflow.page}).')}\n\n"
    if "not_run" in card:
        return f"{head}Not run: {card['not_run']}. `make cards CARDS={name}` runs it.\n"
    where = card["machine"]
    device = "no GPU used" if where["device"] == "cpu" else where["device"]
    versions = [f"{package} {number}" for package, number in where.items() if package not in _MACHINE]
    results = "".join(f"| {what} | {_shown(value)} |\n" for what, value in card["results"].items())
    return (
        f"{head}```\n{_command(card['command'])}\n```\n\n"
        f"| what came out | |\n| :-- | :-- |\n{results}\n"
        f"* Written by `{card['test']}`, {card['date']}, commit {card['commit']}.\n"
        f"* On {where['processor']}, {where['cores']} cores, {device}.\n"
        f"* With {', '.join(versions)}.\n"
        f"* Covers, by number of files: {_covered(card['covers'])}.\n"
    )


def _command(text: str) -> str:
    """In several lines for a shell, each of which begins with a flag."""
    return _wrapped(re.sub(" (?!-)", "\0", text), " \\\n    ").replace("\0", " ")


def _wrapped(text: str, separator: str = "\n") -> str:
    """In lines of at most 116 characters, but for longer words."""
    return separator.join(textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False))


def _covered(files: Sequence[str]) -> str:
    """By folder, each with its number of files."""
    folders = Counter(PurePosixPath(file).parent.as_posix() for file in files)
    return ", ".join(f"`{folder}` ({number})" for folder, number in folders.items())


def _shown(value: Any) -> str:
    """A figure, or several, in a table's cell."""
    if isinstance(value, dict):
        return ", ".join(f"{what} {_shown(each)}" for what, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(_shown, value))
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.7g}" if abs(value) >= 1e-3 else f"{value:.2e}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    main()
