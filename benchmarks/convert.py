"""``sla-convert`` to Hugging Face and back, against a plain copy of the files that it reads: seconds and peak memory.

    python -m benchmarks.convert --model gpt2-350m

A checkpoint with random weights is made with Megatron on the CPU first.  Then the command and the copy take turns, in
both directions, a round after the other, so that the machine's drift cancels; the first rounds (``--warmup``) are left
out.  Both read files that are in the page cache, write to the same disk, and end with fsync of all that they wrote.
Each runs in a process of its own, forked from one that has imported every library: seconds and memory are beyond the
libraries', whose start-up is given once.  Memory is the most that was resident, mapped files included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.files import flush
from sla_megatron.common.flag_types import count

from .models import SHAPES, VARIANTS, hf_config
from .record import Table, add_output_args, check_output, save_figure, shown, spread, write_result

DIRECTIONS = ("megatron-to-hf", "hf-to-megatron")
WAYS = ("convert", "copy")

_COPIED_AT_ONCE = 2**24


def main() -> None:
    """Parse the flags, make the checkpoint, measure, write the result."""
    parser = add_output_args(
        argparse.ArgumentParser(
            prog="benchmarks.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ),
        "convert",
    )
    parser.add_argument("--model", choices=list(SHAPES), default="gpt2-350m", help="the shape (default: gpt2-350m)")
    parser.add_argument("--variant", choices=VARIANTS, default="full", help="its attention (default: full)")
    parser.add_argument("--rounds", type=count("--rounds"), default=5, help="timed (default: 5)")
    parser.add_argument("--warmup", type=count("--warmup", 0), default=1, help="left out (default: 1)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write (default: the system's for such)")
    with one_line_errors():
        args = parser.parse_args()
    check_output(parser, args)
    if args.folder is not None and not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: expected a folder that is there")
    start = time.perf_counter()
    import_libraries()
    startup = time.perf_counter() - start
    with tempfile.TemporaryDirectory(prefix="sla-convert-", dir=args.folder) as name:
        rows = measure(args, Path(name), startup)
    # The device is the CPU: converting needs no other.
    write_result(args, "convert", "cpu", rows, tables, plot)


def import_libraries() -> None:
    """Import, before any fork, what the command imports.  Nothing is computed: threads would not survive a fork."""
    with warnings.catch_warnings(action="ignore"):
        from sla_megatron.cpu.device import megatron_device

        with megatron_device(["--device", "cpu"]), contextlib.redirect_stdout(io.StringIO()):
            import megatron.training.checkpointing  # noqa: F401
            import transformers  # noqa: F401

            import sla_megatron.commands.convert.cli
            import sla_megatron.commands.convert.commands
            import sla_megatron.commands.convert.hf_reader
            import sla_megatron.flags.arguments
            import sla_megatron.model.builder  # noqa: F401


def measure(args: argparse.Namespace, folder: Path, startup: float) -> list[dict[str, Any]]:
    """One row a direction."""
    sources = {"megatron-to-hf": folder / "checkpoint", "hf-to-megatron": folder / "exported"}
    made = in_child(lambda: make_checkpoint(args, sources["megatron-to-hf"]))
    in_child(lambda: convert("megatron-to-hf", sources["megatron-to-hf"], sources["hf-to-megatron"]))
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(args.warmup + args.rounds):
        for direction in DIRECTIONS:
            for way in WAYS if turn % 2 else WAYS[::-1]:
                figures = one_run(direction, way, sources[direction], folder / "result")
                if turn >= args.warmup:
                    found.setdefault((direction, way), []).append(figures)
                print(f"{direction}, {way}: {figures['seconds']:.2f} s", flush=True)
    return [
        {
            "model": args.model,
            "variant": args.variant,
            "parameters": made["value"],
            "startup_seconds": startup,
            "direction": direction,
            "source_bytes": size_of(sources[direction]),
            "result_bytes": int(found[direction, "convert"][0]["result_bytes"]),
            "seconds": {way: spread([each["seconds"] for each in found[direction, way]]) for way in WAYS},
            "peak_bytes": {way: spread([each["peak_bytes"] for each in found[direction, way]]) for way in WAYS},
            "ratio": spread(
                [
                    a["seconds"] / b["seconds"]
                    for a, b in zip(found[direction, "convert"], found[direction, "copy"], strict=True)
                ]
            ),
        }
        for direction in DIRECTIONS
    ]


def make_checkpoint(args: argparse.Namespace, folder: Path) -> int:
    from .checkpoints import save_random_checkpoint

    return save_random_checkpoint(folder, hf_config(args.model, args.variant))


def one_run(direction: str, way: str, source: Path, result: Path) -> dict[str, float]:
    """Seconds, peak memory and written bytes of one conversion or copy, which is then removed."""
    work = (lambda: convert(direction, source, result)) if way == "convert" else (lambda: copy(source, result))
    for path in files_in(source):
        with path.open("rb") as file:
            while file.read(_COPIED_AT_ONCE):
                pass
    # What earlier runs left to be written is not this one's.
    os.sync()
    try:
        figures = in_child(work)
        return {**figures, "result_bytes": size_of(result)}
    finally:
        shutil.rmtree(result, ignore_errors=True)


def convert(direction: str, source: Path, result: Path) -> None:
    """``sla-convert DIRECTION SOURCE RESULT``, and all that it wrote on the disk."""
    from sla_megatron.commands.convert import cli

    sys.argv = ["sla-convert", direction, str(source), str(result)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"sla-convert ended with status {end.code}") from end
    for path in files_in(result):
        flush(path)


def copy(source: Path, result: Path) -> None:
    """Every byte of ``source``'s files read and written, and on the disk."""
    for path in files_in(source):
        target = result / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as before, target.open("wb") as after:
            while part := before.read(_COPIED_AT_ONCE):
                after.write(part)
        flush(target)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_in(folder))


def in_child(work: Callable[[], Any]) -> dict[str, Any]:
    """Run ``work`` in a forked process: its value, its seconds, and the most memory it had beyond what it began with.

    Raises ``RuntimeError`` if it fails; its traceback is printed.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings(action="ignore"):  # Other threads sleep here, and hold no locks.
        pid = os.fork()
    if not pid:
        status = 1
        logging.disable(logging.WARNING)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # The peak is counted anew.
            before, start = resident("VmRSS"), time.perf_counter()
            with warnings.catch_warnings(action="ignore"):
                value = work()
            seconds = time.perf_counter() - start
            figures = {"value": value, "seconds": seconds, "peak_bytes": resident("VmHWM") - before}
            os.write(write, json.dumps(figures).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # Megatron's writer leaves a helper, which an interpreter that ends as usual would end.
            for helper in multiprocessing.active_children():
                helper.terminate()
                helper.join()
            os._exit(status)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        if status:
            raise RuntimeError("a run failed: see above")
        return json.loads(pipe.read())


def resident(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024


def tables(result: dict[str, Any]) -> list[Table]:
    """One row a direction."""
    rows, first = [], result["rows"][0]
    for row in result["rows"]:
        memory = {way: row["peak_bytes"][way]["median"] for way in WAYS}
        rows.append(
            (
                row["direction"],
                f"{row['source_bytes'] / 1e6:.1f}",
                str(row["ratio"]["n"]),
                shown(row["seconds"]["convert"], 2),
                shown(row["seconds"]["copy"], 2),
                shown(row["ratio"], 2),
                f"{memory['convert'] / 1e6:.0f}",
                f"{memory['copy'] / 1e6:.0f}",
            )
        )
    title = f"Conversion: {first['model']} ({first['variant']}, {first['parameters'] / 1e6:.1f}M parameters, fp32)"
    header = ("direction", "read, MB", "runs", "sla-convert, s", "copy, s", "/ copy", "its memory, MB", "copy's, MB")
    note = (
        "Median (least-most); the ratio is of pairs of one round. Page cache warm, fsync included; beyond the "
        f"libraries, whose start-up took {first['startup_seconds']:.1f} s (once)."
    )
    return [Table(title, header, rows, note=note)]


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds of the command and of the copy, both directions."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    ticks = []
    for place, row in enumerate(result["rows"]):
        for offset, way, colour in ((-0.2, "convert", "tab:blue"), (0.2, "copy", "tab:grey")):
            seconds = row["seconds"][way]
            spans = [[seconds["median"] - seconds["min"]], [seconds["max"] - seconds["median"]]]
            label = {"convert": "sla-convert", "copy": "copy of the same files"}[way] if not place else None
            axes.barh(place + offset, seconds["median"], 0.36, xerr=spans, capsize=3, color=colour, label=label)
        ticks.append(f"{row['direction']}\n{row['source_bytes'] / 1e9:.2f} GB")
    axes.set_yticks(range(len(ticks)), ticks)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend()
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
