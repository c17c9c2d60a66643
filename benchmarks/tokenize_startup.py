"""What ``sla-data tokenize`` takes before its first document is encoded, and when it says something meanwhile.

    python -m benchmarks.tokenize_startup --out benchmarks/results/tokenize-startup-cpu.json

The command runs as its users run it, from the start of Python on, with its output in a pipe: on one document, whose
time is nearly all start-up; on 64 small shards, where every worker has work; and on 8 MB with one worker, beside a
process that does no more than encode the same lines with the same library.  CPU seconds are those of all its processes,
whoever their parents are.  Rates of long runs are ``tokenize_throughput.py``'s.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.flag_types import count

from .record import Table, add_output_args, check_output, shown, spread, write_result
from .tokenize_throughput import byte_level_bpe, sentencepiece, write_corpus

WORKERS = (1, 2, 16)
#: Runs by name -> bytes of text, what --shard-mb says, and for which --workers.
RUNS = {"one document": (1, "16", (1, 16)), "64 shards": (3_200_000, "0.05", WORKERS), "8 MB": (8_000_000, "16", (1,))}

_SUBREAPER = 36  # prctl(2): PR_SET_CHILD_SUBREAPER.

#: Lines of JSON encoded with the library alone, in a process of its own.
LOOPS = {
    "SentencePieceTokenizer": """\
import json, sentencepiece, sys
encode = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1]).encode_as_ids
for line in open(sys.argv[2]):
    encode(json.loads(line)["text"])
""",
    "HuggingFaceTokenizer": """\
import json, sys
from transformers import AutoTokenizer
encode = AutoTokenizer.from_pretrained(sys.argv[1])
for line in open(sys.argv[2]):
    encode(json.loads(line)["text"])
""",
}


def main() -> None:
    """Parse the flags, make corpus and tokenizers, measure in turns, write the result."""
    parser = add_output_args(
        argparse.ArgumentParser(
            prog="benchmarks.tokenize_startup",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ),
        "tokenize-startup",
    )
    parser.add_argument("--tokenizers", nargs="+", choices=list(LOOPS), default=list(LOOPS), help="default: both")
    parser.add_argument("--rounds", type=count("--rounds"), default=3, help="of all runs (default: 3)")
    with one_line_errors():
        args = parser.parse_args()
    check_output(parser, args)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="sla-data-") as name:
        folder = Path(name)
        parts = write_corpus(folder, 40_000_000)
        corpora = {run: _first_lines(parts[0], folder / f"{run}.jsonl", size) for run, (size, _, _) in RUNS.items()}
        make = {"SentencePieceTokenizer": sentencepiece, "HuggingFaceTokenizer": byte_level_bpe}
        made = {name: make[name](folder, parts, 8192) for name in args.tokenizers}
        rows = measure(args, folder, corpora, made)
    write_result(args, "tokenize", "cpu", rows, tables)


def adopt_orphans() -> None:
    """Whose parent ends is this process's child from now on, so that its CPU time can be asked for."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)


def _first_lines(path: Path, target: Path, size: int) -> Path:
    """The first lines of ``path`` with ``size`` bytes or a little more."""
    with path.open() as source, target.open("w") as file:
        while file.tell() < size:
            file.write(source.readline())
    return target


def measure(
    args: argparse.Namespace, folder: Path, corpora: dict[str, Path], made: dict[str, dict[str, str]]
) -> list[dict[str, Any]]:
    """One row a run, number of workers and tokenizer."""
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for turn in range(args.rounds):
        for tokenizer, settings in made.items():
            flags = ["--tokenizer-type", tokenizer, "--tokenizer-model", settings["tokenizer_model"]]
            for run, (_, shard_mb, numbers) in RUNS.items():
                for workers in numbers:
                    prefix = folder / f"{tokenizer}-{run}-{workers}-{turn}"
                    command = [sys.executable, "-m", "sla_megatron.commands.data.cli", "tokenize", *flags]
                    command += ["--input", str(corpora[run]), "--output-prefix", str(prefix)]
                    command += ["--shard-mb", shard_mb, "--workers", str(workers)]
                    figures = one_run(command, Path(f"{prefix}.sla-data") / "shards")
                    found.setdefault((tokenizer, run, workers), []).append(figures)
                    print(f"{tokenizer}, {run}, {workers} workers: {figures}", flush=True)
            loop = [sys.executable, "-c", LOOPS[tokenizer], settings["tokenizer_model"], str(corpora["8 MB"])]
            found.setdefault((tokenizer, "8 MB, a loop", 1), []).append(one_run(loop))
    return [
        {
            "tokenizer": tokenizer,
            "run": run,
            "workers": workers,
            **{what: spread([each[what] for each in all_figures]) for what in all_figures[0]},
        }
        for (tokenizer, run, workers), all_figures in found.items()
    ]


def one_run(command: list[str], shards: Path | None = None) -> dict[str, float]:
    """Seconds of ``command``: until it said something, its longest silence, until a first shard, in all; and of CPU."""
    begun = time.perf_counter()
    first_shard, over, said = None, None, [0.0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as child:
        while True:
            ready, _, _ = select.select([child.stdout], [], [], 0.01)
            now = time.perf_counter() - begun
            # The server of its workers may hold its output open for longer.
            if over is None and os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                over = now
            if shards is not None and first_shard is None and any(shards.glob("[0-9]*.json")):
                first_shard = now
            if ready:
                if not os.read(child.stdout.fileno(), 1 << 16):
                    break
                said.append(now)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        said.append(time.perf_counter() - begun if over is None else over)
        cpu, status = 0.0, 0
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, ended, used = os.wait4(-1, 0)
                cpu += used.ru_utime + used.ru_stime
                if pid == child.pid:
                    status = child.returncode = os.waitstatus_to_exitcode(ended)
    if status:
        raise SystemExit(f"{' '.join(command)}: status {status}")
    figures = {"seconds": said[-1], "cpu_seconds": cpu}
    if shards is None:
        return figures
    silences = [after - before for before, after in zip(said, said[1:], strict=False)]
    # A single small shard may come and go between two looks.
    first_shard = said[-1] if first_shard is None else first_shard
    return {"first_word": said[1], "longest_silence": max(silences), "first_shard": first_shard, **figures}


def tables(result: dict[str, Any]) -> list[Table]:
    """All runs, and what of the CPU time is beyond the loop's."""
    rows = []
    loops = {row["tokenizer"]: row for row in result["rows"] if row["run"] == "8 MB, a loop"}
    for row in result["rows"]:
        cells = [row["tokenizer"], row["run"], str(row["workers"])]
        for what in ("first_word", "longest_silence", "first_shard", "seconds", "cpu_seconds"):
            cells.append(shown(row[what], 2) if what in row else "")
        loop = loops[row["tokenizer"]]["cpu_seconds"]["median"]
        cells.append(f"{row['cpu_seconds']['median'] / loop:.2f}" if row["run"] == "8 MB" else "")
        rows.append(cells)
    header = ["tokenizer", "input", "workers", "first word, s", "longest silence, s", "first shard, s", "all, s"]
    return [Table("sla-data tokenize from its start", [*header, "CPU, s", "/ the loop's CPU"], rows, left=(0, 1))]


if __name__ == "__main__":
    main()
