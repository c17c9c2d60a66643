"""Write ``docs/results.md`` from the JSON files in ``benchmarks/results``, and from nothing else.

    python -m benchmarks.results_page            # writes it
    python -m benchmarks.results_page --check    # ends with status 1 where it is not what the files say

A file's name begins with its benchmark's.  What has no file is on the page as not measured, with the command that
measures it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla_megatron.common.files import write_whole

from .record import ROOT, Table
from .targets import before_and_after, targets

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"

Result = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """One benchmark's part of the page.

    Attributes:
        name: the benchmark's, with which its files begin.
        title: of the section.
        module: has ``tables(result)``.
        text: what the figures are.
        on_gpu: the command that measures it on a GPU.
    """

    name: str
    title: str
    module: str
    text: str
    on_gpu: str


SECTIONS = (
    Section(
        "throughput",
        "Training speed and memory",
        "benchmarks.throughput",
        "Dense and skip-layer models take turns, step by step, in the same processes. Above 1, `speed / dense` is "
        "faster than dense.",
        "python -m benchmarks.throughput --models gpt2-124m gpt2-350m --contexts 1024 4096 8192 16384 --rounds 30",
    ),
    Section(
        "operations",
        "Operations, counted",
        "benchmarks.operations",
        "What a step, or a decoded token, has torch start and write, exactly. A small model on a fast GPU takes the "
        "time that starting its operations takes.",
        "python -m benchmarks.operations",
    ),
    Section(
        "transport",
        "Pipelines",
        "benchmarks.transport",
        "What crosses the hops of a pipeline and what waits on its ranks, against the lower bound and two other ways.",
        "python -m benchmarks.transport --ranks 4",
    ),
    Section(
        "plan",
        "A step, predicted",
        "benchmarks.plan_steps",
        "What `sla-plan` says of a step with the rates that `sla-doctor --rates` measures, and what it takes.",
        "",
    ),
    Section(
        "generation",
        "Generation",
        "benchmarks.generation",
        "Greedy decoding with the Hugging Face model; the peer is transformers' own GPT-2 or Llama of the same shape. "
        "`narrow` and `narrow-llama` are models so small that their time is that of starting operations, of which a "
        "layer that reads an earlier one has more. Compiled: with a static cache, and a step is one graph; a `full` "
        "model computes its dead projections too then.",
        "python -m benchmarks.generation --model gpt2-124m --prompts 128 1024 4096 16384",
    ),
    Section(
        "convert",
        "Conversion",
        "benchmarks.convert",
        "`sla-convert` against a copy of the same files.",
        "",
    ),
    Section(
        "tokenize",
        "Text to tokens",
        "benchmarks.tokenize_startup",
        "`sla-data tokenize` from its start; [data](data.md) has its rates in long runs.",
        "",
    ),
    Section(
        "recovery",
        "Going on after a fault",
        "benchmarks.recovery",
        "`launch/slurm.sbatch` on a real Slurm of three nodes, all on one machine of two cores, with two ranks of a "
        "small model: at seeded times a rank is killed, a node is set down, or a rank is killed and the newest "
        "checkpoint damaged. There starting takes most of the time, and seconds grow with what else the machine does; "
        "CPU seconds do less. Slurm's delay for jobs that are requeued is 6 seconds there, and 121 by default "
        "(`cred_expire`).",
        "",
    ),
    Section(
        "start",
        "Start of a rank",
        "benchmarks.rank_start",
        "From the start of Python to the end of the first save, on the CPU; checkouts take turns.",
        "",
    ),
    Section(
        "datatrove",
        "Text to tokens beside datatrove",
        "benchmarks.tokenize_peers",
        "`sla-data tokenize` and datatrove's `DocumentTokenizer`, the same text and tokenizer, in turns on one core. "
        "Rates are beyond the start, a run on one document: that of sla-data is that of transformers with torch.",
        "",
    ),
    Section(
        "sweep",
        "Loss",
        "benchmarks.sweep",
        "Equal tokens in equal order; a difference to dense is between runs of the same seed. Runs of a sweep may "
        "share their machine with other work: their tokens/s compare nothing. On a CPU: `examples/sweep/cpu.yaml`, and "
        "`examples/sweep/methods.yaml`: a family of methods at equal tokens, which begin with dense's weights, and, "
        "pruned and with a wider MLP, at equal parameters, which do not. There, in five seeds of a short run and no "
        "further, SkipV1Former is below dense in all, both ways; SLA, its values alone and CLA are at equal tokens, "
        "and at equal parameters spread around dense; the other reading, keys alone and what is half-shared differ "
        "from dense by no more than they spread.",
        "sla-sweep run examples/sweep/paper.yaml --out runs/paper",
    ),
    Section(
        "loss",
        "Loss of a short run",
        "benchmarks.loss",
        "Dense and skip-layer, one run of each, from the same seed on the same batches.",
        "python -m benchmarks.loss --model gpt2-124m --context 1024 --iterations 150 --global-batch-size 32",
    ),
    Section(
        "encoder",
        "Another domain: a bidirectional encoder",
        "examples.encoder.report",
        "Megatron's BERT on data that [the example](../examples/encoder/README.md) makes, dense against skip-layer.",
        "python -m examples.encoder.run --device cuda",
    ),
)

HEAD = """\
# Results

Written by `python -m benchmarks.results_page` from the files in `benchmarks/results`; [benchmarks](benchmarks.md) says
what each command measures, [sweeps](sweep.md) how losses are compared. A figure is a median (or a mean over seeds) with
its spread in brackets. What was not run is not measured, and says so.
"""

PAPER = """\
## What the paper reports

The paper (arXiv 2406.11274) trains GPT-2 124M, 350M and 774M on OpenWebText. It finds a lower validation loss than
dense, most with 9 skip layers and 9 skip heads of 12, and more so at longer contexts; it gives neither running time nor
memory. Its tables were not at hand; the one figure of them here is as others quote it. Its losses are of models and
token counts that nobody has trained with this project yet:

| | the paper | here |
| :-- | :-- | :-- |
| GPT-2 124M, 350M, 774M on OpenWebText | lower loss than dense | not measured: `examples/sweep/paper-growth.yaml` |
| longer contexts | larger gain: at 16k, 124M, 0.1329 nats (as quoted) | not measured: the same file |
| distance and heads | 9 and 9 of 12 best | at a processor's size: [Loss](#loss); else `examples/sweep/paper.yaml` |
| several source layers | left open | not measured: `examples/sweep/paper.yaml` has them |
| running time, memory | "no additional computational burden", not measured | [below](#training-speed-and-memory) |
| other domains | left open | at a processor's size: [an encoder](#another-domain-a-bidirectional-encoder) |
"""


#: What the rows of before have in common.
BEFORE = """\
Each ratio is to dense in a run of its own. Before, freed memory was not kept ([benchmarks](benchmarks.md)): part of a
difference, and of the spreads, may be the measurement's.
"""

#: Results of which an earlier state is kept in a ``-before`` file -> what was changed since.
CHANGES = {
    "throughput-cpu": """\
Before: `attention.py` and `microbatch_kv.py` as they were before commit 8ccedc7, all else unchanged. A layer whose K/V
are read later handed on copies, and now hands on views of its projection; with `pruned`, every layer copied queries,
keys and values out of its projection, and now those layers alone that leave rows out. `pruned` with grouped queries
and rotary embedding held less before: its copies let go of the projection, which a dense layer keeps, since its values
are a view of it.
""",
    "throughput-cpu-4k": """\
The gradients of keys and values that a layer reads itself, and a later one too, are summed in one pass over them, where
autograd took some five: it filled what nobody else reads with zeros, put the pieces together, and added. And in `full`,
a layer that joins its own K/V with an earlier layer's kept its queries as a view of its projection, and with it the
keys and values in the projection that it had copied, or that nobody reads. Its queries are now copied as well where
they are a view, and the projection is freed: the step's peak is dense's.
""",
    "operations-cpu": """\
A layer that reads an earlier one left slicing, joining and filling with zeros to autograd, piece by piece. Now one
function takes all of it, one operation each way (`attention/mixing.py`), and packing for a hop copies K/V from where
they lie.
""",
    "generation-cpu": """\
Before, keys and values were kept in another order than that of the heads, so that each reader's were one slice, and
queries and outputs were taken there and back, two operations each in source layers and readers; a prompt's tokens took
one call of attention for each layer that is read. Now groups are kept in their order; a token sees the blocks of a
periodic pattern (`NSSS NSSS NSSS`) as rows of the batch, views all of them; a prompt takes one call. And a `full` model
does not compute projections that nobody reads, where they are most of a layer's.
""",
    "generation-cpu-narrow": """\
Before, a `full` model gathered the live rows of its K/V weights for each token; now it does with each prompt. A layer
that reads an earlier one projected keys and values one by one, and called attention for each layer that it reads; now
they are projected together, and where few keys and values are read, copies of them take one call. Before, two threads;
after, one (`OMP_NUM_THREADS=1`).
""",
    "convert-cpu": """\
CPU seconds; each against a copy in its own run. Before, a tensor was read whole and copied into another one, its rows
put together in a third, and then written; now rows go to the file from the mapped file that they lie in, both ways. An
export imported Megatron's trainer for the types of a checkpoint's arguments and for a tokenizer; now neither. On the
way back, Megatron's writer handed its results to itself through a process that imported torch for them.
""",
    "tokenize-startup-cpu": """\
Before, the command and the server of its workers imported Megatron before a word was said, and each worker started at
once, to import transformers and build its tokenizer. Now what waits says so; a worker starts when a shard is there for
it; and a tokenizer of sentencepiece or transformers comes from that library, with the ids that Megatron's object has.
""",
    "recovery-cpu": """\
Before, every failure had the job requeued: Slurm's delay, and its queue. Now a first failure is gone on from on the
nodes that the job has. Ranks imported torch's compiler (on the CPU, where it is switched off), wandb and transformers,
which most runs do not use, and looked for garbage meanwhile; and their first save waited for a process that handed its
results from one process to the same one, and imported torch for it. A node that is set down still costs a requeue.
Other work shared the machine, not as much of it each time: the requeue and CPU seconds compare; what seconds of the
starts compare is in [Start of a rank](#start-of-a-rank), where both took turns.
""",
    "generation-cpu-narrow-compiled": """\
The same change; of it a compiled step has the one call of attention. Two threads before, and one after, too.
""",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="compare with --out, write nothing")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"--results {args.results}: expected a folder of JSON files")
    text = page(args.results, args.out.parent)
    if not args.check:
        write_whole(args.out, text)
        print("written:", args.out)
    elif not args.out.is_file() or args.out.read_text() != text:
        sys.exit(f"{args.out} is not what {args.results} says: run python -m benchmarks.results_page")


def page(results: Path, folder: Path) -> str:
    """The page's text, with links for a page in ``folder``."""
    files = {path: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    current = {path: result for path, result in files.items() if not _is_before(path)}
    earlier = {path: result for path, result in files.items() if path not in current}
    parts = [HEAD, "## Targets\n", targets(_named(current)).as_markdown(), PAPER]
    for section in SECTIONS:
        parts += [f"## {section.title}\n", section.text + "\n"]
        own = {path: result for path, result in current.items() if path.stem.split("-")[0] == section.name}
        for path, result in own.items():
            parts += _measured(section, path, result, folder, _plots(path, files))
        has_gpu = any(result["machine"]["device"] != "cpu" for result in own.values())
        if not own:
            parts.append("On a CPU: not measured.\n")
        if section.on_gpu and not has_gpu:
            parts.append(f"On a GPU: not measured. `{section.on_gpu}`\n")
    parts += ["## Speed changes\n", BEFORE]
    for path, result in earlier.items():
        after = current.get(path.with_name(path.name.replace("-before", "")))
        if after is not None:
            what = path.stem.replace("-before", "")
            parts += [CHANGES[what], before_and_after(what.split("-")[0], result, after).as_markdown()]
    return "\n".join(parts)


def _plots(path: Path, files: Iterable[Path]) -> list[Path]:
    """The pictures of ``path``: those whose name begins with its own, and with no other file's longer one."""
    longer = [other.stem for other in files if other.stem.startswith(path.stem) and other != path]
    found = sorted(path.parent.glob(f"{path.stem}*.svg"))
    return [plot for plot in found if not any(plot.stem.startswith(stem) for stem in longer)]


def _measured(section: Section, path: Path, result: Result, folder: Path, plots: Iterable[Path]) -> list[str]:
    """One file's part: where and how, tables, plots."""
    tables: list[Table] = importlib.import_module(section.module).tables(result)
    where = result["machine"]
    device = where["processor"] if where["device"] == "cpu" else where["device"]
    versions = ", ".join(
        f"{name} {where[name]}" for name in ("torch", "megatron-core", "transformers") if name in where
    )
    line = f"{device}, {where['cores']} cores; {versions}; commit {result['commit']}, {result['date']}"
    links = [f"![{plot.stem}]({os.path.relpath(plot, folder)})\n" for plot in plots]
    return [f"`{result['command']}`\n", line + "\n", *(table.as_markdown() for table in tables), *links]


def _is_before(path: Path) -> bool:
    """Whether it is of an earlier state, kept for comparison: ``throughput-cpu-before.json``."""
    return "before" in path.stem.split("-")


def _named(files: dict[Path, Result]) -> dict[str, list[Result]]:
    """Results by benchmark."""
    found: dict[str, list[Result]] = {}
    for path, result in files.items():
        found.setdefault(path.stem.split("-")[0], []).append(result)
    return found


if __name__ == "__main__":
    main()
