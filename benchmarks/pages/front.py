"""``docs/results.md``: what skip-layer attention brings and costs, in a page; every figure links to its rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..record import Table, shown
from .claims import BRINGS, COSTS, TOOLS, table
from .detail import link, of_benchmark
from .evidence import Result, device, is_on_gpu
from .sections import ENCODER, NEWCOMER, OPERATIONS, PAPER, SWEEPS, THEMES, VISION, page_of, sweep_command

HEAD = """\
# Results

What skip-layer attention (SLA) brings and costs beside the same model without it (dense), as far as it was measured.
Each line shows the **worst** of its rows, with its spread in brackets, how many runs that is of (n), and the device;
its link leads to all rows with their commands and commits. `full` keeps the projections that nobody reads, `pruned`
leaves them out ([flags](../README.md#flags)).
"""

#: Title, what its figures are, and its lines.
PARTS = (
    (
        "What it brings",
        "Below 0 a loss is better, above 0 an accuracy: the mean over seeds, each minus dense's of the same seed, and\n"
        "its 95 % interval. Equal tokens, small models, short runs.",
        BRINGS,
    ),
    ("What it costs", "Speed above 1 is faster than dense; memory and bytes below 1 are less.", COSTS),
    ("The tools", "", TOOLS),
)

FOOT = """\
Written by `python -m benchmarks.results_page` from the files in `benchmarks/results` and nothing else;
[benchmarks](benchmarks.md) says what each command measures, [sweeps](sweep.md) how losses are compared.
"""

#: Of the benchmark of a newcomer's path.
NEWCOMER_STEPS = {"first_loss": "the first loss", "export": "an export that was compared", "plan": "the first plan"}

#: Loss against tokens.
PICTURE = "sweep-cpu-longer-tokens.svg"

PAPER_TEXT = f"""\
The paper ([arXiv 2406.11274](https://arxiv.org/abs/2406.11274)) trains GPT-2 on OpenWebText. Its tables were not at
hand; its one figure here is as others quote it. [Listed](results/{PAPER}#what-does-not-hold): what does not hold here.
"""

#: The paper's claims, and where this project's runs say something of them.
PAPER_CLAIMS = (
    (
        "lower loss than dense at 124M, 350M and 774M",
        f"not its models: `sla-sweep run examples/sweep/paper-growth.yaml --out runs/growth`; small ones: "
        f"[of two sizes](results/{PAPER}#larger-models)",
    ),
    (
        "most with 9 skip layers and 9 skip heads of 12",
        f"[shares of layers and of heads](results/{PAPER}#shares-of-layers-and-of-heads), "
        f"[both readings of the nine](results/{PAPER}#both-readings)",
    ),
    (
        "more at longer contexts: 0.1329 nats at 16k, 124M",
        f"[a longer context](results/{PAPER}#longer-contexts), [by position](results/{PAPER}#loss-by-position)",
    ),
    ("neither time nor memory", "[what it costs](#what-it-costs)"),
    ("other domains left open", f"[an encoder](results/{page_of(ENCODER)}), [images](results/{page_of(VISION)})"),
)


def page(files: dict[Path, Result], results: Path, folder: Path) -> str:
    """The text, with links for a page in ``folder``; pictures are in ``results``."""
    parts = [HEAD]
    for title, text, claims in PARTS:
        parts += [f"## {title}\n", *([text + "\n"] if text else []), table(claims, files).as_markdown()]
    parts += filter(None, [_newcomer(files)])
    picture = results / PICTURE
    parts.append("## Loss against tokens\n")
    parts.append(
        f"![loss against tokens, dense and SLA]({link(picture, folder)})\n"
        if picture.is_file()
        else f"Not measured: `{sweep_command('longer')}`\n"
    )
    paper = Table("", ("the paper", "here"), PAPER_CLAIMS, (0, 1))
    parts += ["## What the paper reports\n", PAPER_TEXT, paper.as_markdown()]
    parts += ["## Not measured\n", "\n".join(_not_measured(files)) + "\n"]
    rows = [f"[{theme.title}](results/{theme.file})" for theme in THEMES]
    parts += ["## All rows\n", ", ".join([*rows, f"[the paper's questions](results/{PAPER})"]) + ".\n", FOOT]
    return "\n".join(parts)


def _newcomer(files: dict[Path, Result]) -> str:
    """A line of its times; empty where there are none."""
    lines = []
    for result in of_benchmark(NEWCOMER.name, files).values():
        seconds = {row["step"]: row["seconds"] for row in result["rows"]}
        times = [f"{shown(seconds[step], 0)} s to {what}" for step, what in NEWCOMER_STEPS.items()]
        lines.append(
            f"[A newcomer's path](results/{page_of(NEWCOMER)}) in a fresh clone, from the start of each command: "
            f"{', '.join(times)}; n {seconds['plan']['n']}; {device(result)}.\n"
        )
    return "\n".join(lines)


def _not_measured(files: dict[Path, Result]) -> Iterator[str]:
    """A line for each benchmark that has no file of a device, and for each row that could not be measured."""
    for section in (section for theme in THEMES for section in theme.sections):
        own = of_benchmark(section.name, files).values()
        title = f"[{section.title}](results/{page_of(section)})"
        if all(map(is_on_gpu, own)):
            yield f"* {title}, on a CPU: `{section.command}`"
        elif section is SWEEPS:
            yield from (f"* {title}, on a CPU: `{command}`" for command in _missing_sweeps(files))
        if section.on_gpu and not any(map(is_on_gpu, own)):
            yield f"* {title}, on a GPU: `{section.on_gpu}`"
        for result in own:
            for row in result["rows"]:
                # Settings that operations refuses are no gap: nothing is to be counted there.
                refused = row.get("refused") if section is not OPERATIONS else None
                if reason := row.get("not_measured", refused):
                    yield f"* {title}: `{_repeated(result['command'])}`: {reason}"


def _missing_sweeps(files: dict[Path, Result]) -> Iterator[str]:
    """The commands of the grids that a claim asks for and that have no file, or not all of it."""
    there = {word for path in files for word in path.stem.split("-")}
    asked = (claim for claim in BRINGS if claim.files)
    missing = (each.files[0] for each in asked if each.files[0] not in there or not each.is_measured(files))
    for name in dict.fromkeys(missing):
        yield sweep_command(name)


def _repeated(command: str) -> str:
    """Without where its result went."""
    return re.sub(r" --out \S+| --log \S+| --overwrite", "", command)
