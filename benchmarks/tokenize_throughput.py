"""``sla-data tokenize`` with one worker against the same tokenizer alone in a loop, and its memory as the input grows.

    python benchmarks/tokenize_throughput.py --json tokenize_throughput.json

The text is the Python sources that are installed beside this project, a document a file.  Tokenizers are trained on a
part of it first.  Both run on one core of the same process and take turns, a part of the text at a time, so that the
machine's drift cancels.  The loop has its texts in memory and throws its ids away; the command reads JSON lines, writes
and merges shards, and builds its tokenizer anew for each part.  Reported: the ratio of their rates by CPU time and by
the clock, and the most memory above the libraries for a tenth of the text and for all of it, in shards of 2 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import sysconfig
import tempfile
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sla_megatron.commands.data.cli import main as sla_data
from sla_megatron.common.files import fault_of_file, write_json

ROUNDS = 4


def main() -> None:
    """Make the corpus, train the tokenizers, measure, print a table and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=100, help="megabytes of text (default: 100)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of both tokenizers (default: 8192)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    if args.json is not None and (expected := fault_of_file(args.json, overwrite=False)) is not None:
        parser.error(f"--json {args.json}: expected {expected.removesuffix(', or --overwrite beside it')}")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = write_corpus(folder, int(args.mb * 1e6))
        rows = []
        for tokenizer in (
            sentencepiece(folder, parts, args.vocab_size),
            byte_level_bpe(folder, parts, args.vocab_size),
        ):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            rows.append(measure(folder, parts, tokenizer))
    report(rows, args.json)


def write_corpus(folder: Path, size: int) -> list[Path]:
    """About ``size`` bytes of source files as ``ROUNDS`` files of JSON lines, and one of a tenth of that."""
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = Path(sysconfig.get_paths()["purelib"])
    parts = [folder / f"part{i}.jsonl" for i in range(ROUNDS)]
    written, seen = 0, set()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("w")) for path in parts]
        small = stack.enter_context((folder / "tenth.jsonl").open("w"))
        sources = (p for root in (library, packages) for p in sorted(root.rglob("*.py")))
        for number, path in enumerate(sources):
            if path.resolve() in seen or written >= size:
                continue
            seen.add(path.resolve())
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                line = json.dumps({"text": text}) + "\n"
                files[number % ROUNDS].write(line)
                if small.tell() < size / 10:
                    small.write(line)
                written += len(text.encode())
    if written < size:
        sys.exit(f"--mb {size / 1e6:g}: expected at most {written / 1e6:.0f}, which is what is installed here")
    return parts


def texts_of(path: Path) -> list[str]:
    with path.open() as file:
        return [json.loads(line)["text"] for line in file]


def sentencepiece(folder: Path, parts: list[Path], size: int) -> dict[str, str]:
    model = folder / "tokenizer.model"
    flags = ["--vocab-size", str(size), "--sample-mb", "4", "--output", str(model)]
    sla_data(["tokenizer", "--input", str(parts[0]), *flags])
    return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model)}


def byte_level_bpe(folder: Path, parts: list[Path], size: int) -> dict[str, str]:
    """As GPT-2's."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    tokenizer.train_from_iterator(texts_of(parts[0])[:400], size, special_tokens=[end], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=end).save_pretrained(folder / "bpe")
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder / "bpe")}


@contextlib.contextmanager
def timed(seconds: Counter[str], name: str) -> Iterator[None]:
    clock, cpu = time.perf_counter(), time.process_time()
    yield
    seconds[name + " clock"] += time.perf_counter() - clock
    seconds[name + " cpu"] += time.process_time() - cpu


def measure(folder: Path, parts: list[Path], settings: dict[str, str]) -> dict[str, Any]:
    """One tokenizer: both ways over each part, in turns, then memory."""
    from sla_megatron.common.silence import without_announcements
    from sla_megatron.common.tokenizers import DEFAULTS, build

    with without_announcements():
        import megatron.core.datasets.indexed_dataset  # noqa: F401
    tokenizer = build(Namespace(**{**DEFAULTS, **settings}))
    flags = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), value)]
    prefix = folder / settings["tokenizer_type"]
    seconds: Counter[str] = Counter()
    size = tokens = expected = 0
    for number, part in enumerate(parts):
        texts = texts_of(part)
        for way in ("loop", "command") if number % 2 else ("command", "loop"):
            with timed(seconds, way):
                if way == "loop":
                    expected += sum(len(tokenizer.tokenize(text)) for text in texts) + len(texts)
                else:
                    run(["tokenize", "--input", str(part), "--output-prefix", f"{prefix}{number}", *flags])
        size += sum(len(text.encode()) for text in texts)
        tokens += json.loads(Path(f"{prefix}{number}.json").read_text())["tokens"]
    if tokens != expected:
        raise SystemExit(f"the command wrote {tokens} tokens, the loop counted {expected}")
    small = ["--shard-mb", "2", "--input"]
    inputs = {"tenth": [*small, str(folder / "tenth.jsonl")], "all": [*small, *map(str, parts)]}
    return {
        "tokenizer": settings["tokenizer_type"],
        "text_bytes": size,
        "tokens": tokens,
        "mb_per_cpu_second": {way: size / 1e6 / seconds[way + " cpu"] for way in ("loop", "command")},
        "ratio_cpu": seconds["loop cpu"] / seconds["command cpu"],
        "ratio_clock": seconds["loop clock"] / seconds["command clock"],
        "peak_bytes_above_libraries": {
            name: peak_memory(["tokenize", *inputs[name], "--output-prefix", f"{prefix}-{name}", *flags])
            for name in inputs
        },
        "versions": json.loads(Path(f"{prefix}0.json").read_text())["settings"]["versions"],
    }


def run(arguments: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sla_data(arguments)


def peak_memory(arguments: list[str]) -> int:
    """Bytes that the command needs at most in a process that has imported everything."""
    read, write = os.pipe()
    with warnings.catch_warnings(action="ignore"):  # Other threads sleep here, and hold no locks.
        pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            Path("/proc/self/clear_refs").write_text("5")  # The peak is counted anew.
            before = resident("VmRSS")
            run(arguments)
            os.write(write, str(resident("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        return int(pipe.read())


def resident(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024


def report(rows: list[dict[str, Any]], path: Path | None) -> None:
    print("tokenizer                MB  loop MB/s  sla-data MB/s  ratio (cpu)  ratio (clock)  memory 1/10  memory")
    for row in rows:
        rate, memory = row["mb_per_cpu_second"], row["peak_bytes_above_libraries"]
        print(
            f"{row['tokenizer']:22} {row['text_bytes'] / 1e6:4.0f}  {rate['loop']:9.2f}  {rate['command']:13.2f}"
            f"  {row['ratio_cpu']:11.3f}  {row['ratio_clock']:13.3f}"
            f"  {memory['tenth'] / 1e6:8.0f} MB {memory['all'] / 1e6:4.0f} MB"
        )
    if path:
        write_json(path, {"rows": rows})


if __name__ == "__main__":
    main()
