"""``sla-data tokenize`` beside datatrove's ``DocumentTokenizer``: the same text, the same tokenizer, the same ids.

    pip install --no-deps datatrove orjson loguru humanize
    python -m benchmarks.tokenize_peers --out benchmarks/results/datatrove-cpu.json

The text is the Python sources that are installed beside this project, a file a document, and again a paragraph a
document; the tokenizer a byte-level BPE as GPT-2's, trained on a part of it.  Each tool reads JSON lines and writes
token ids, an end of document after each, in the order of the input, in a process of its own on one core, as its users
start it; they take turns.  What counts are CPU seconds.  A run on one document is what a tool takes to start, which a
long run does not notice: the rate is that of all tokens over the CPU seconds beyond it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy

from sla_megatron.commands.data.inspection import open_sound_index
from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.flag_types import count, number

from .record import Table, add_output_args, check_output, shown, spread, write_result
from .tokenize_startup import adopt_orphans, one_run
from .tokenize_throughput import byte_level_bpe, texts_of, write_corpus

#: Its documents are not shuffled: they are to be compared.
DATATROVE = """\
import sys
source, tokenizer, out = sys.argv[1:]
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
folder, _, name = source.rpartition("/")
read = JsonlReader(folder, glob_pattern=name)
write = DocumentTokenizer(out, tokenizer + "/tokenizer.json", eos_token="<|endoftext|>", shuffle_documents=False)
LocalPipelineExecutor([read, write], tasks=1, workers=1, logging_dir=out + "-logs").run()
"""
NEEDED = ("datatrove", "orjson", "loguru", "humanize")
TOOLS = ("sla-data", "datatrove")


def main() -> None:
    """Parse the flags, make the corpora, measure in turns, compare the ids, write the result."""
    parser = add_output_args(
        argparse.ArgumentParser(
            prog="benchmarks.tokenize_peers",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ),
        "datatrove",
    )
    parser.add_argument("--rounds", type=count("--rounds"), default=3, help="of all runs (default: 3)")
    parser.add_argument("--mb", type=number("--mb", float, "megabytes greater than 0"), default=16.0)
    with one_line_errors():
        args = parser.parse_args()
    check_output(parser, args)
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        parser.exit(2, f"{parser.prog}: error: expected to be installed: {' '.join(lacking)}\n")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="tokenize-peers-") as name:
        folder = Path(name)
        parts = write_corpus(folder, int(args.mb * 1e6))
        tokenizer = byte_level_bpe(folder, parts, 8192)["tokenizer_model"]
        corpora = {"files": _write(folder / "files.jsonl", _files(parts))}
        corpora["paragraphs"] = _write(folder / "paragraphs.jsonl", _paragraphs(parts))
        rows = measure(args, folder, corpora, tokenizer)
    write_result(args, "datatrove", "cpu", rows, tables)


def _files(parts: Iterable[Path]) -> Iterator[str]:
    for part in parts:
        yield from texts_of(part)


def _paragraphs(parts: Iterable[Path]) -> Iterator[str]:
    for text in _files(parts):
        yield from (paragraph for paragraph in text.split("\n\n") if paragraph.strip())


def _write(path: Path, texts: Iterable[str]) -> Path:
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def measure(args: argparse.Namespace, folder: Path, corpora: dict[str, Path], tokenizer: str) -> list[dict[str, Any]]:
    """One row a corpus: both tools' figures, and the ratio of their rates round by round."""
    one = _write(folder / "one.jsonl", ["One document."])
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(args.rounds):
        for corpus, path in {"one": one, **corpora}.items():
            for tool in TOOLS if turn % 2 else TOOLS[::-1]:
                out = folder / f"{tool}-{corpus}-{turn}"
                figures = one_run(_command(tool, path, tokenizer, out))
                found.setdefault((tool, corpus), []).append(figures)
                print(f"{corpus}, {tool}: {figures}", flush=True)
    rows = []
    for corpus, path in corpora.items():
        ends, ids = _ours(folder / f"sla-data-{corpus}-0")
        for turn in range(args.rounds):
            theirs = _theirs(folder / f"datatrove-{corpus}-{turn}")
            if not all(map(numpy.array_equal, (ends, ids), theirs)):
                sys.exit(f"{corpus}: the tools wrote different ids")
        tools, rates = {}, {}
        for tool in TOOLS:
            starts = [run["cpu_seconds"] for run in found[tool, "one"]]
            runs = [run["cpu_seconds"] for run in found[tool, corpus]]
            rates[tool] = [len(ids) / (run - start) for run, start in zip(runs, starts, strict=True)]
            tools[tool] = {
                "start_cpu_seconds": spread(starts),
                "cpu_seconds": spread(runs),
                "seconds": spread([run["seconds"] for run in found[tool, corpus]]),
                "tokens_per_cpu_second": spread(rates[tool]),
            }
        rows.append(
            {
                "corpus": corpus,
                "documents": len(ends),
                "text_bytes": sum(len(text.encode()) for text in texts_of(path)),
                "tokens": len(ids),
                "tools": tools,
                "speed_over_datatrove": spread([a / b for a, b in zip(*(rates[t] for t in TOOLS), strict=True)]),
                "versions": {name: importlib.metadata.version(name) for name in ("datatrove", "tokenizers")},
            }
        )
    return rows


def _command(tool: str, source: Path, tokenizer: str, out: Path) -> list[str]:
    if tool == "datatrove":
        return [sys.executable, "-c", DATATROVE, str(source), tokenizer, str(out)]
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    command = [sys.executable, "-m", "sla_megatron.commands.data.cli", "tokenize", *flags]
    return [*command, "--input", str(source), "--output-prefix", str(out)]


def _ours(prefix: Path) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Where documents end, in tokens, and all ids: of 16 bits, as the vocabulary is small."""
    index = open_sound_index(str(prefix))
    lengths = index.mapped(index.lengths)
    return numpy.cumsum(lengths, dtype=numpy.int64), numpy.fromfile(f"{prefix}.bin", numpy.uint16)


def _theirs(folder: Path) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The same of what datatrove wrote: a file of ids, and beside it the ends as numbers of 64 bits."""
    (path,) = folder.glob("*.ds")
    return numpy.fromfile(f"{path}.index", numpy.uint64).astype(numpy.int64), numpy.fromfile(path, numpy.uint16)


def tables(result: dict[str, Any]) -> list[Table]:
    """A line a corpus and tool."""
    rows = []
    for row in result["rows"]:
        for tool in TOOLS:
            figures = row["tools"][tool]
            rows.append(
                [
                    f"{row['corpus']}, {row['text_bytes'] / row['documents']:,.0f} bytes each",
                    tool,
                    shown(figures["start_cpu_seconds"], 2),
                    shown(figures["cpu_seconds"], 2),
                    shown(figures["tokens_per_cpu_second"], 0),
                    shown(row["speed_over_datatrove"]) if tool == "sla-data" else "",
                ]
            )
    first = result["rows"][0]
    note = (
        f"{first['text_bytes'] / 1e6:.0f} MB of text; datatrove {first['versions']['datatrove']}, tokenizers "
        f"{first['versions']['tokenizers']} for both. The ids and the ends of documents are equal."
    )
    header = ["documents", "tool", "start, CPU s", "all, CPU s", "tokens a CPU second", "/ datatrove's"]
    return [Table("Tokens a second on one core", header, rows, left=(0, 1), note=note)]


if __name__ == "__main__":
    main()
