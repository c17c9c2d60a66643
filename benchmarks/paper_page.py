"""The text of ``docs/results/paper.md``: the paper's questions, answered by this project's runs, from JSON alone.

Each section begins with an answer that follows from the intervals by rule, so that words cannot contradict figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .comparisons import Result, holm
from .paper_sections import SECTIONS, Ledger, not_holding
from .record import ROOT

#: The files that are read, where they are there, and their pictures, by stem.
SOURCES = (
    "sweep-cpu-questions",
    "sweep-cpu-longer",
    "sweep-cpu-larger",
    "sweep-cpu-methods",
    "positions-cpu",
    "loss-gpu-124m-4k",
)
_PICTURES = {"Longer contexts": "sweep-cpu-longer-tokens", "Loss by position": "positions-cpu"}

HEAD = """\
# The paper's questions

Skip-Layer Attention (arXiv 2406.11274), asked again with runs of this project. [Sweeps]({sweep}) says how runs are made
equal and how to repeat all of them. Models and token counts are a processor's: a sign here is a sign here.
"""

QUOTED = """\
## What the paper says

Its tables were not at hand; these figures are as others quote them.

* It trains GPT-2 124M, 350M and 774M on OpenWebText; its loss is below dense, most with 9 skip layers and 9 skip heads
  of 12, and more so at longer contexts.
* Longer contexts, as quoted: 0.1329 nats at 16k for 124M; no gain for 124M at 4k and 8k.
* Larger models, as quoted: 0.0829 nats at 8k for 350M.
* Shares, as quoted: 0.1076 nats for 124M with nine skip layers, the context not stated.
* None of its models has been trained here to its token counts; no replication by others was found.
"""

METHOD = """\
## How to read it

Losses are Megatron's validation losses after the last iteration, in nats a token. A pair is a skip-layer run and the
dense run of its text, context and seed: the same tokens in the same order. A difference is the mean over pairs with the
95 % interval of the paired t test, and its p, two-sided; below 0, skip-layer attention is better. With three seeds a
text's interval is wide: 4.3 standard errors on each side, where many seeds have 2. All texts together are taken as
pairs of one kind, though the runs of one seed begin with the same weights on each.

{counted}
"""


def page(files: dict[Path, Result], folder: Path) -> str:
    """The page, with links for a page in ``folder``; what has no file is not measured."""
    by_stem = {path.stem: result for path, result in files.items()}
    places = {path.stem: path for path in files}
    ledger, short, parts = Ledger(), [], []
    for title, question, answered in SECTIONS:
        answer = answered(by_stem, ledger)
        # Its first sentence.
        said = answer.split("\n\n")[0].split(". ")[0].strip().removesuffix(".")
        short.append(f"* [{title}](#{title.lower().replace(' ', '-')}): {said}.")
        parts += [f"## {title}\n", question + "\n", answer, *_picture(title, places, folder)]
    head = HEAD.format(sweep=os.path.relpath(ROOT / "docs" / "sweep.md", folder))
    rest = "## What does not hold\n\n" + not_holding(ledger.made)
    listed = [stem for stem in SOURCES if stem in places]
    sources = ["## Files\n", *(_source(places[stem], by_stem[stem], folder) for stem in listed)]
    method = METHOD.format(counted=_counted(ledger))
    return "\n".join([head, *short, "", method, *parts, rest, QUOTED, *sources, ""])


def _picture(title: str, places: dict[str, Path], folder: Path) -> list[str]:
    """The section's, where it has been drawn."""
    name = _PICTURES.get(title, "")
    result = places.get(name.removesuffix("-tokens"))
    if result is None or not result.with_name(f"{name}.svg").is_file():
        return []
    return [f"![{name}]({os.path.relpath(result.with_name(f'{name}.svg'), folder)})\n"]


def _counted(ledger: Ledger) -> str:
    """How many tests there are, and how many of them stay."""
    p_values = [entry.found.p for entry in ledger.made if entry.found.p is not None]
    if not p_values:
        return "No comparison has an interval yet."
    low, chance, kept = sum(p < 0.05 for p in p_values), len(p_values) / 20, holm(p_values)
    return (
        f"This page makes {len(p_values)} comparisons, many of them of the same runs. Were there no difference at all, "
        f"about {chance:.0f} would have p < 0.05; {low} have. By Holm's correction for all of them, {kept} do."
    )


def _source(path: Path, result: Result, folder: Path) -> str:
    where = result["machine"]
    device = where.get("processor", "") if where["device"] == "cpu" else where["device"]
    runs, commits = len(result["rows"]), _commits(result["rows"])
    trained = f"; trained at {', '.join(commits)}" if commits else ""
    link = f"[{path.stem}]({os.path.relpath(path, folder)})"
    return (
        f"* {link}: {runs} runs, {device}, commit {result['commit']}{trained}, {result['date']}; `{result['command']}`"
    )


def _commits(rows: Iterable[dict]) -> list[str]:
    return sorted({row["commit"] for row in rows if "commit" in row})
