"""Write ``docs/results.md`` and ``docs/results/*.md`` from the JSON files in ``benchmarks/results``, and nothing else.

    python -m benchmarks.results_page            # writes them
    python -m benchmarks.results_page --check    # ends with status 1 where they are not what the files say

A file's name begins with its benchmark's.  What has no file is on the page as not measured, with the command that
measures it.  A file that does not say where its figures come from (commit, command, machine, n) is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sla_megatron.common.files import write_whole

from .pages import detail, front
from .pages.evidence import Result, problems
from .pages.sections import PAPER, THEMES
from .record import ROOT

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--out", type=Path, default=PAGE, metavar="FILE", help="the first page; the others are in a folder of its name"
    )
    parser.add_argument("--check", action="store_true", help="compare with --out and the others, write nothing")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"--results {args.results}: expected a folder of JSON files")
    files = load(args.results)
    for path, result in files.items():
        if found := problems(result):
            parser.error(f"--results: {path}: {found[0]}")
    texts = pages(files, args.results, args.out)
    if args.check:
        _compare(texts, args.results, args.out)
        return
    args.out.with_suffix("").mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_whole(path, text)
    print("written:", *texts)


def load(results: Path) -> dict[Path, Result]:
    """Every file of ``results``, in the order of their names."""
    return {path: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}


def pages(files: dict[Path, Result], results: Path, out: Path) -> dict[Path, str]:
    """Every page and its text: ``out``, and those in the folder of its name."""
    folder = out.with_suffix("")
    made = {out: front.page(files, results, out.parent)}
    made |= {folder / theme.file: detail.page(theme, files, folder) for theme in THEMES}
    from . import paper_page

    return made | {folder / PAPER: paper_page.page(files, folder)}


def _compare(texts: dict[Path, str], results: Path, out: Path) -> None:
    """End with status 1 where a page is not what ``results`` says, or is one too many."""
    for path, text in texts.items():
        if not path.is_file() or path.read_text() != text:
            sys.exit(f"{path} is not what {results} says: run python -m benchmarks.results_page")
    if extra := sorted(set(out.with_suffix("").glob("*.md")) - set(texts)):
        sys.exit(f"{extra[0]} is no page of benchmarks.results_page: remove it")


if __name__ == "__main__":
    main()
