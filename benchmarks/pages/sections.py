"""Which page shows which benchmark, and how each is measured where it was not yet."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One benchmark's part of a page.

    Attributes:
        name: the benchmark's, with which its files begin.
        title: of the section.
        module: has ``tables(result)``.
        text: what the figures are; links are relative to ``docs/results``.
        on_gpu: the command that measures it on a GPU; empty where a GPU changes nothing.
        on_cpu: the command that measures it on a processor, if it is not the module's own.
    """

    name: str
    title: str
    module: str
    text: str
    on_gpu: str = ""
    on_cpu: str = ""

    @property
    def command(self) -> str:
        """On a processor."""
        return self.on_cpu or f"python -m {self.module}"

    @property
    def anchor(self) -> str:
        """Of its heading, as Markdown's readers make it."""
        return re.sub(r"[^\w -]", "", self.title.lower()).replace(" ", "-")


@dataclass(frozen=True)
class Theme:
    """A page: its file's name, its title, its sections."""

    file: str
    title: str
    sections: tuple[Section, ...]


TRAINING = Section(
    "throughput",
    "Training speed and memory",
    "benchmarks.throughput",
    "Dense and skip-layer models take turns, step by step, in the same processes. Above 1, `speed / dense` is faster "
    "than dense; in brackets, the middle half of the rounds.",
    "python -m benchmarks.throughput --models gpt2-124m gpt2-350m --contexts 1024 4096 8192 16384 --rounds 30",
)
OPERATIONS = Section(
    "operations",
    "Operations, counted",
    "benchmarks.operations",
    "What a step, or a decoded token, has torch start and write, exactly. A small model on a fast GPU takes the time "
    "that starting its operations takes.",
    "python -m benchmarks.operations",
)
PIPELINES = Section(
    "transport",
    "Pipelines",
    "benchmarks.transport",
    "What crosses the hops of a pipeline and what waits on its ranks, against the lower bound and two other ways "
    "([pipelines](../pipeline.md)).",
    "python -m benchmarks.transport --ranks 4",
)
PLAN = Section(
    "plan",
    "A step, predicted",
    "benchmarks.plan_steps",
    "What `sla-plan` says of a step with the rates that `sla-doctor --rates` measures, and what it takes.",
)
GENERATION = Section(
    "generation",
    "Generation",
    "benchmarks.generation",
    "Greedy decoding with the Hugging Face model, in turns; the peer is transformers' own GPT-2 or Llama of the same "
    "shape. `narrow` and `narrow-llama` are models so small that their time is that of starting operations, of which a "
    "layer that reads an earlier one has more. Compiled: with a static cache, and a step is one graph; a `full` model "
    "computes its dead projections too then.",
    "python -m benchmarks.generation --model gpt2-124m --prompts 128 1024 4096 16384",
)
CONVERSION = Section("convert", "Conversion", "benchmarks.convert", "`sla-convert` against a copy of the same files.")
TOKENIZING = Section(
    "tokenize",
    "Text to tokens",
    "benchmarks.tokenize_startup",
    "`sla-data tokenize` from its start; [data](../data.md) has its rates in long runs.",
)
DATATROVE = Section(
    "datatrove",
    "Text to tokens beside datatrove",
    "benchmarks.tokenize_peers",
    "`sla-data tokenize` and datatrove's `DocumentTokenizer`, the same text and tokenizer, in turns on one core. Rates "
    "are beyond the start, a run on one document: that of sla-data is that of transformers with torch.",
)
RECOVERY = Section(
    "recovery",
    "Going on after a fault",
    "benchmarks.recovery",
    "`launch/slurm.sbatch` on a real Slurm of three nodes, all on one machine of two cores, with two ranks of a small "
    "model: at seeded times a rank is killed, a node is set down, or a rank is killed and the newest checkpoint "
    "damaged. There starting takes most of the time, and seconds grow with what else the machine does; CPU seconds do "
    "less. Slurm's delay for jobs that are requeued is 6 seconds there, and 121 by default (`cred_expire`).",
)
START = Section(
    "start",
    "Start of a rank",
    "benchmarks.rank_start",
    "From the start of Python to the end of the first save, on the CPU.",
)
NEWCOMER = Section(
    "newcomer",
    "A newcomer's path",
    "benchmarks.newcomer",
    "From a fresh clone to the first loss, the first export and the first plan, by the README's own commands.",
)


def sweep_command(grid: str) -> str:
    """What trains a grid of examples/sweep on a processor."""
    return f"sla-sweep run examples/sweep/{grid}.yaml --out runs/{grid} --device cpu"


SWEEPS = Section(
    "sweep",
    "Loss",
    "benchmarks.sweep",
    "Equal tokens in equal order; a difference to dense is between runs of the same seed ([sweeps](../sweep.md)). What "
    "follows from them for the paper's claims is a [page of its own](paper.md); other methods are in "
    "[variants](../variants.md).",
    "sla-sweep run examples/sweep/paper.yaml --out runs/paper",
    sweep_command("questions"),
)
LOSS = Section(
    "loss",
    "Loss of a short run",
    "benchmarks.loss",
    "Dense and skip-layer, one run of each, from the same seed on the same batches.",
    "python -m benchmarks.loss --model gpt2-124m --context 1024 --iterations 150 --global-batch-size 32",
    "python -m benchmarks.loss --model quickstart --device cpu",
)
ENCODER = Section(
    "encoder",
    "A bidirectional encoder",
    "examples.encoder.report",
    "Megatron's BERT on data that [the example](../../examples/encoder/README.md) makes, dense against skip-layer.",
    "python -m examples.encoder.run --device cuda",
    "python -m examples.encoder.run",
)
VISION = Section(
    "vision",
    "Images",
    "examples.vision.report",
    "Megatron's vision transformer, dense against skip-layer, on images that a package ships.",
    "python -m examples.vision.run --device cuda",
    "python -m examples.vision.run",
)

THEMES = (
    Theme("training.md", "training", (TRAINING,)),
    Theme("operations.md", "operations", (OPERATIONS,)),
    Theme("pipelines.md", "pipelines and their plan", (PIPELINES, PLAN)),
    Theme("generation.md", "generation and cache", (GENERATION,)),
    Theme("conversion.md", "conversion", (CONVERSION,)),
    Theme("data.md", "text to tokens", (TOKENIZING, DATATROVE)),
    Theme("recovery.md", "start and recovery", (RECOVERY, START, NEWCOMER)),
    Theme("loss.md", "losses", (SWEEPS, LOSS)),
    Theme("domains.md", "other domains", (ENCODER, VISION)),
)

#: Made by ``benchmarks.paper_page``, of sweeps and of what it alone shows.
PAPER = "paper.md"


def page_of(section: Section) -> str:
    """Where it is, from ``docs/results``: ``training.md#training-speed-and-memory``."""
    file = next(theme.file for theme in THEMES if section in theme.sections)
    return f"{file}#{section.anchor}"
