"""What a rank takes from the start of Python to its first step, and to the end of its first save.

    python -m benchmarks.rank_start --checkouts ../before . --rounds 5

One rank of a small model on the processor, as ``launch/slurm.sbatch`` would start it, which trains one step, saves and
ends.  Checkouts take turns, a round after the other, so that other work on the machine meets all of them.  CPU seconds
are those of the rank and its helpers; modules are counted in a run of its own (``-X importtime``), the helpers' too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sla_megatron.common.environment import commit
from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.flag_types import count

from .record import ROOT, Table, add_output_args, check_output, shown, spread, write_result
from .recovery import MODEL

#: One stage holds the whole model.
ALONE = ["--pipeline-model-parallel-size", "1", "--train-iters", "1", "--lr-decay-iters", "1", "--save-interval", "1"]
_SAVED = re.compile(r"\[[\d-]+ (\d+):(\d+):([\d.]+)\] (saving checkpoint|successfully saved checkpoint)")


def main() -> None:
    """Parse the flags, measure in turns, write the result."""
    parser = add_output_args(
        argparse.ArgumentParser(
            prog="benchmarks.rank_start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ),
        "start",
    )
    parser.add_argument("--checkouts", type=Path, nargs="+", default=[ROOT], metavar="DIR", help="default: this one")
    parser.add_argument("--rounds", type=count("--rounds"), default=5, help="of all checkouts (default: 5)")
    parser.add_argument("--note", default="", help="what else the machine did meanwhile")
    with one_line_errors():
        args = parser.parse_args()
    check_output(parser, args)
    for checkout in args.checkouts:
        if not (checkout / "sla_megatron").is_dir():
            parser.error(f"--checkouts {checkout}: expected folders with sla_megatron in them")
    args.checkouts = [path.resolve() for path in args.checkouts]
    rows = measure(args)
    args.checkouts = [commit(path) for path in args.checkouts]
    write_result(args, "start", "cpu", rows, tables)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a checkout."""
    found: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in args.checkouts}
    for turn in range(args.rounds):
        for checkout in args.checkouts if turn % 2 else args.checkouts[::-1]:
            figures, _ = one_start(checkout)
            found[checkout].append(figures)
            print(f"{commit(checkout)}: {figures}", flush=True)
    rows = []
    for checkout, all_figures in found.items():
        _, said = one_start(checkout, "-X", "importtime")
        modules = len(re.findall(r"^import time: +\d", said, re.MULTILINE))
        spreads = {what: spread([each[what] for each in all_figures]) for what in all_figures[0]}
        rows.append({"commit": commit(checkout), "modules": modules, **spreads})
    return rows


def one_start(checkout: Path, *options: str) -> tuple[dict[str, float], str]:
    """Seconds of a rank: of CPU, in all, and of its first save; and what it said."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment |= {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as name, Path(name, "said").open("w+") as said:
        flags = [*MODEL, *ALONE, "--exit-signal-handler", "--save", f"{name}/c", "--load", f"{name}/c"]
        begun = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, *options, "-m", "sla_megatron.pretrain_gpt", *flags],
            cwd=name, env=environment, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begun
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if child.returncode:
        sys.exit(f"{checkout}: a rank ended with {child.returncode}:\n{text[-3000:]}")
    times = {what: int(hours) * 3600 + int(minutes) * 60 + float(s) for hours, minutes, s, what in _SAVED.findall(text)}
    # With those of the children that it waited for.
    cpu = used.ru_utime + used.ru_stime
    first_save = times["successfully saved checkpoint"] - times["saving checkpoint"]
    return {"cpu_seconds": cpu, "seconds": seconds, "first_save_seconds": first_save}, text


def tables(result: dict[str, Any]) -> list[Table]:
    """A row a commit."""
    rows = [
        [
            row["commit"],
            str(row["modules"]),
            shown(row["cpu_seconds"], 2),
            shown(row["seconds"], 2),
            shown(row["first_save_seconds"], 2),
        ]
        for row in result["rows"]
    ]
    header = ["commit", "modules imported", "CPU, s", "all, s", "first save, s"]
    return [Table("A rank: start, one step, one save", header, rows, note=result["settings"].get("note", ""))]


if __name__ == "__main__":
    main()
