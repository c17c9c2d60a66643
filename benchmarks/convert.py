"""``sla-convert`` to Hugging Face and back, against a plain copy of the files that it reads: CPU seconds, and memory.

    python -m benchmarks.convert --models gpt2-124m gpt2-350m

Checkpoints of two sizes, with random weights, are made with Megatron on the CPU first.  Then the command and the copy
take turns, each in a process of its own, in both directions, at both sizes, a round after the other, so that the
machine's drift cancels; the first rounds (``--warmup``) are left out.  Both read files that are in the page cache,
write to the same disk, and end with fsync of all that they wrote.

CPU seconds are those of the process and its helpers.  Of the command they are told apart: imports (with the start of
Python), what grows with the bytes (the difference of the two sizes), and the rest, which is fixed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.flag_types import count

from .models import SHAPES, VARIANTS, hf_config
from .record import ROOT, Table, add_output_args, check_output, save_figure, shown, spread, write_result

DIRECTIONS = ("megatron-to-hf", "hf-to-megatron")
WAYS = ("convert", "copy")

_RUN = Path(__file__).with_name("conversion_run.py")
_READ_AT_ONCE = 2**24

#: Of a run.
Figures = dict[str, float]


def main() -> None:
    """Parse the flags, make the checkpoints, measure, write the result."""
    parser = add_output_args(
        argparse.ArgumentParser(
            prog="benchmarks.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ),
        "convert",
    )
    parser.add_argument(
        "--models",
        choices=list(SHAPES),
        nargs=2,
        default=["gpt2-124m", "gpt2-350m"],
        metavar="NAME",
        help=f"two shapes, the smaller first, of {', '.join(SHAPES)} (default: gpt2-124m gpt2-350m)",
    )
    parser.add_argument("--variant", choices=VARIANTS, default="full", help="their attention (default: full)")
    parser.add_argument("--directions", choices=DIRECTIONS, nargs="+", default=list(DIRECTIONS), help="default: both")
    parser.add_argument("--rounds", type=count("--rounds"), default=3, help="timed (default: 3)")
    parser.add_argument("--warmup", type=count("--warmup", 0), default=1, help="left out (default: 1)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write (default: the system's for such)")
    parser.add_argument(
        "--package", type=Path, metavar="DIR", help="a checkout whose sla_megatron is measured (default: this one)"
    )
    with one_line_errors():
        args = parser.parse_args()
    check_output(parser, args)
    if args.folder is not None and not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: expected a folder that is there")
    if args.package is not None and not (args.package / "sla_megatron").is_dir():
        parser.error(f"--package {args.package}: expected a folder with sla_megatron in it")
    with tempfile.TemporaryDirectory(prefix="sla-convert-", dir=args.folder) as name:
        rows = measure(args, Path(name))
    # The device is the CPU: converting needs no other.
    write_result(args, "convert", "cpu", rows, tables, plot, args.package)


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row a direction."""
    package = (args.package or ROOT).resolve()
    parameters = in_child(lambda: [make_checkpoint(args, folder, model) for model in args.models])
    for model in args.models if DIRECTIONS[1] in args.directions else ():
        one_run(package, DIRECTIONS[0], "convert", folder / model / DIRECTIONS[0], folder / model / DIRECTIONS[1])
    found: dict[tuple[str, str, str], list[Figures]] = {}
    for turn in range(args.warmup + args.rounds):
        for model in args.models:
            for direction in args.directions:
                for way in WAYS if turn % 2 else WAYS[::-1]:
                    source, result = folder / model / direction, folder / "result"
                    figures = one_run(package, direction, way, source, result)
                    figures |= {"source_bytes": size_of(source), "result_bytes": size_of(result)}
                    shutil.rmtree(result)
                    if turn >= args.warmup:
                        found.setdefault((model, direction, way), []).append(figures)
                    print(f"{model}, {direction}, {way}: {figures['cpu_seconds']:.2f} CPU seconds", flush=True)
    return [
        row_of(
            direction,
            args.variant,
            {model: {way: found[model, direction, way] for way in WAYS} for model in args.models},
            dict(zip(args.models, parameters, strict=True)),
        )
        for direction in args.directions
    ]


def row_of(
    direction: str, variant: str, runs: dict[str, dict[str, list[Figures]]], parameters: dict[str, int]
) -> dict[str, Any]:
    """What the runs of one direction tell.

    Args:
        direction: one of :data:`DIRECTIONS`.
        variant: of the models.
        runs: model, the smaller first -> way -> figures of each run.
        parameters: of each model.
    """
    sizes = [
        {
            "model": model,
            "parameters": parameters[model],
            "source_bytes": int(of_ways["convert"][0]["source_bytes"]),
            "result_bytes": int(of_ways["convert"][0]["result_bytes"]),
            **{
                figure: {way: spread([run[figure] for run in of_ways[way]]) for way in WAYS}
                for figure in ("cpu_seconds", "seconds", "peak_bytes")
            },
            "work_seconds": {
                way: spread([run["cpu_seconds"] - run["import_seconds"] for run in of_ways[way]]) for way in WAYS
            },
        }
        for model, of_ways in runs.items()
    ]
    small, large = sizes
    added = large["source_bytes"] - small["source_bytes"]
    slope = {way: (_work(large, way) - _work(small, way)) / added for way in WAYS}
    imports = [run["import_seconds"] for of_ways in runs.values() for run in of_ways["convert"]]
    return {
        "direction": direction,
        "variant": variant,
        "sizes": sizes,
        "import_seconds": spread(imports),
        "fixed_seconds": _work(small, "convert") - slope["convert"] * small["source_bytes"],
        "seconds_per_gb": {way: slope[way] * 1e9 for way in WAYS},
        "slope_over_copy": slope["convert"] / slope["copy"],
    }


def _work(size: dict[str, Any], way: str) -> float:
    return size["work_seconds"][way]["median"]


def make_checkpoint(args: argparse.Namespace, folder: Path, model: str) -> int:
    from .checkpoints import save_random_checkpoint

    return save_random_checkpoint(folder / model / DIRECTIONS[0], hf_config(model, args.variant))


def one_run(package: Path, direction: str, way: str, source: Path, result: Path) -> Figures:
    """What ``conversion_run.py`` says of one conversion or copy."""
    for path in files_in(source):
        with path.open("rb") as file:
            while file.read(_READ_AT_ONCE):
                pass
    # What earlier runs left to be written is not this one's.
    os.sync()
    command = [sys.executable, "-P", str(_RUN), way, direction, str(source), str(result)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a run failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_in(folder))


def in_child(work: Callable[[], Any]) -> Any:
    """The value of ``work`` in a forked process, so that this one never imports Megatron."""
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with warnings.catch_warnings(action="ignore"):
                os.write(write, json.dumps(work()).encode())
            status = 0
        finally:
            import multiprocessing

            # Megatron's writer leaves a helper, which an interpreter that ends as usual would end.
            for helper in multiprocessing.active_children():
                helper.terminate()
                helper.join()
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("no checkpoint was made: see above")
    return json.loads(said)


def tables(result: dict[str, Any]) -> list[Table]:
    """What CPU seconds are made of, a row a direction; and all runs, a row a direction and size."""
    parts, runs = [], []
    for row in result["rows"]:
        parts.append(
            (
                row["direction"],
                shown(row["import_seconds"], 2),
                f"{row['fixed_seconds']:.2f}",
                *(f"{row['seconds_per_gb'][way]:.2f}" for way in WAYS),
                f"{row['slope_over_copy']:.2f}",
            )
        )
        for size in row["sizes"]:
            memory = [f"{size['peak_bytes'][way]['median'] / 1e6:.0f}" for way in WAYS]
            runs.append(
                (
                    *(row["direction"], size["model"], f"{size['source_bytes'] / 1e6:.1f}"),
                    str(size["cpu_seconds"]["convert"]["n"]),
                    *(shown(size[figure][way], 2) for figure in ("cpu_seconds", "seconds") for way in WAYS),
                    *memory,
                )
            )
    variant = result["rows"][0]["variant"]
    return [
        Table(
            f"Conversion: what its CPU seconds are made of ({variant}, fp32)",
            ("direction", "imports, s", "fixed, s", "s/GB", "copy's s/GB", "/ copy"),
            parts,
            note="CPU seconds. Imports: median (least-most); s/GB: the medians' difference of the two sizes below, "
            "without imports; fixed: what is left.",
        ),
        Table(
            "The same, whole runs",
            (
                *("direction", "model", "read, MB", "runs", "CPU s", "copy's CPU s", "s", "copy's s"),
                *("its memory, MB", "copy's, MB"),
            ),
            runs,
            (0, 1),
            "Median (least-most). Page cache warm, fsync included. Memory is the most that was resident, libraries and "
            "mapped files included.",
        ),
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """CPU seconds of the command and of the copy at the larger size, both directions, by what they are made of."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    ticks = []
    for place, row in enumerate(result["rows"]):
        size = row["sizes"][-1]
        gb = size["source_bytes"] / 1e9
        bars: Sequence[tuple[float, str, str, float]] = (
            (-0.2, "imports", "tab:orange", row["import_seconds"]["median"]),
            (-0.2, "fixed", "tab:green", max(0.0, row["fixed_seconds"])),
            (-0.2, "by the bytes", "tab:blue", row["seconds_per_gb"]["convert"] * gb),
            (0.2, "copy of the same files", "tab:grey", size["cpu_seconds"]["copy"]["median"]),
        )
        left = {-0.2: 0.0, 0.2: 0.0}
        for offset, label, colour, seconds in bars:
            shown_once = label if not place else None
            axes.barh(place + offset, seconds, 0.36, left=left[offset], color=colour, label=shown_once)
            left[offset] += seconds
        ticks.append(f"{row['direction']}\n{gb:.2f} GB")
    axes.set_yticks(range(len(ticks)), ticks)
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds")
    axes.legend()
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
