"""How long a training on Slurm takes to go on after a fault, by part, and how much of its time was of use.

    python -m benchmarks.recovery --faults 3 --seed 1

Starts the Slurm of the tests on this machine (three nodes), submits ``launch/slurm.sbatch`` with a small training, and
does what clusters do, in an order and at times that ``--seed`` draws: a rank is killed (``kill``), a node is set down
(``node``), or a rank is killed and the newest checkpoint has lost the end of a file by the time that the job starts
again (``damage``).  A fault comes when a step is reached for the first time, at a moment within it.

Reported are the seconds from each fault to the next new step, one that no attempt had done before, by part
(``recovery_log.PARTS``); steps that were lost; CPU seconds of each rank until its first step, which other work on the
machine changes little; and useful time / wall time: the steps of the result times the median step, over the time from
the first start to the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from sla_megatron.common.checkpoint_folders import checkpoints, newest_complete
from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.flag_types import count

# The one thing here that is the tests': a cluster of real daemons, which is as long to write as all of this.
from tests.support.slurm import Cluster, cluster, missing, processes_with

from .record import ROOT, Table, add_output_args, check_output, shown, spread, write_result
from .recovery_log import PARTS, Event, attempts, recoveries, written

KINDS = ("kill", "node", "damage")
NODES = 2

#: Two stages of a pipeline, one on each node: the least that has K/V to send.
MODEL = """
--sla --sla-skip-distance 2 --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64
--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 16 --pipeline-model-parallel-size 2
--no-create-attention-mask-in-dataloader --lr 0.01 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
--log-interval 1 --eval-iters 0 --eval-interval 1000 --device cpu
""".split()

_STEP = re.compile(r"iteration +(\d+)/ *\d+ .*per iteration \(ms\): ([\d.]+)")

#: What a rank's command line has, and torchrun's and srun's do not begin with.
_RANK = b"-m\0sla_megatron.pretrain_gpt\0"


def main() -> None:
    """Parse the flags, run the job with its faults, write the result."""
    parser = add_output_args(
        argparse.ArgumentParser(
            prog="benchmarks.recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ),
        "recovery",
    )
    parser.add_argument("--faults", type=count("--faults", 1), default=3, help="how many (default: 3)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of which kinds (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of kinds and times (default: 1)")
    parser.add_argument("--iterations", type=count("--iterations", 1), default=60, help="of the training (default: 60)")
    parser.add_argument("--save-interval", type=count("--save-interval", 1), default=10, help="default: 10")
    parser.add_argument("--launch", choices=("torchrun", "srun"), default="torchrun", help="default: torchrun")
    parser.add_argument(
        "--async-saves",
        action="store_true",
        help="with --async-save; what refuses it is the result where it cannot run",
    )
    parser.add_argument("--note", default="", help="what else the machine did meanwhile")
    parser.add_argument("--log", type=Path, metavar="FILE", help="where to keep all lines with their times")
    parser.add_argument(
        "--checkout", type=Path, metavar="DIR", help="whose launch/slurm.sbatch is measured (default: this one)"
    )
    with one_line_errors():
        args = parser.parse_args()
    check_output(parser, args)
    if missing():
        parser.error(f"Slurm is not installed: expected {', '.join(missing())} on the PATH")
    checkout = (args.checkout or ROOT).resolve()
    if not (checkout / "launch" / "slurm.sbatch").is_file():
        parser.error(f"--checkout {args.checkout}: expected a folder with launch/slurm.sbatch in it")
    if args.iterations <= 2 * args.save_interval + args.faults * 2:
        parser.error(
            f"--iterations {args.iterations}: expected more than {2 * args.save_interval + args.faults * 2}, two "
            "checkpoints before the first fault and two steps for each"
        )
    with tempfile.TemporaryDirectory(prefix="sla-recovery-") as name:
        rows = measure(args, checkout, Path(name))
    write_result(args, "recovery", "cpu", rows, tables, checkout=checkout)


def pattern(args: argparse.Namespace) -> list[tuple[int, str, float]]:
    """The faults: at which step, of which kind, and how far into the next step, of 1."""
    rng = random.Random(args.seed)
    kinds = [args.kinds[i % len(args.kinds)] for i in range(args.faults)]
    rng.shuffle(kinds)
    # With two checkpoints to fall back to, and two steps between faults.
    room = range(0, args.iterations - 2 * args.save_interval - 2 * args.faults)
    places = sorted(rng.choices(room, k=args.faults))
    return [
        (2 * args.save_interval + 1 + place + 2 * number, kind, rng.random())
        for number, (place, kind) in enumerate(zip(places, kinds, strict=True))
    ]


def measure(args: argparse.Namespace, checkout: Path, folder: Path) -> list[dict[str, Any]]:
    """One row: the run, with what each of its faults took."""
    rng = random.Random(args.seed)
    with cluster(folder / "slurm", NODES + 1) as slurm:
        run = folder / "run"
        job = submit(args, slurm, checkout, run)
        with watched(slurm, run) as watch:
            for step, kind, fraction in pattern(args):
                before = watch.reach(slurm, job, step)
                if before is None:
                    break
                time.sleep(fraction * before)
                cause(slurm, run, job, kind, rng, watch)
            state = slurm.until(job, {"COMPLETED", "FAILED", "CANCELLED"})["JobState"]
        events = watch.events()
        if args.log:
            args.log.write_text(written(events))
        if args.async_saves and (refusal := watch.refusal()):
            return [{"launch": args.launch, "async_saves": True, "refused": refusal}]
        if state != "COMPLETED":
            sys.exit(f"the job ended as {state}:\n{watch.complaints()}")
    return [row_of(args, [Event.of(*each) for each in events])]


def submit(args: argparse.Namespace, slurm: Cluster, checkout: Path, run: Path) -> str:
    """The job's number."""
    flags = [*MODEL, "--train-iters", args.iterations, "--lr-decay-iters", args.iterations]
    flags += ["--save-interval", args.save_interval]
    flags += ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"] if args.async_saves else []
    names = {"RUN_DIR": str(run), "PYTHON": sys.executable, "NPROC": "1", "OMP_NUM_THREADS": "1"}
    # Others' modules stay behind the checkout, which the script puts first.
    further = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(ROOT))]
    names |= {"PYTHONPATH": os.pathsep.join(further)}
    names |= {"LAUNCH": args.launch} if args.launch != "torchrun" else {}
    # What refuses its flags does so each time.
    names |= {"MAX_FAILURES": "1"} if args.async_saves else {}
    options = ["--parsable", f"--nodes={NODES}", "--job-name=recovery", f"--output={run}.log"]
    return slurm.command("sbatch", *options, "launch/slurm.sbatch", *flags, cwd=checkout, **names).strip()


class Watch:
    """Reads what is said, as it is said, and keeps the time of each line; and ranks' CPU time at their first step."""

    def __init__(self, slurm: Cluster, run: Path) -> None:
        self.run = run
        daemons = {f"slurmd: {node}": slurm.folder / "log" / f"slurmd-{node}.log" for node in slurm.nodes}
        self.files = {"": Path(f"{run}.log"), "slurmctld:": slurm.folder / "log" / "slurmctld.log", **daemons}
        self.lines: list[tuple[float, str]] = []
        self.over = threading.Event()
        self._first_step_is_next = False
        self._read = dict.fromkeys(self.files, 0)

    def follow(self) -> None:
        """Until :attr:`over`, and what is there then."""
        last = False
        while not last:
            last = self.over.wait(0.005)
            for name in self.files:
                self._read_on(name)

    def say(self, line: str) -> None:
        """A line of the benchmark's own."""
        self.lines.append((time.time(), f"recovery: {line}"))

    def events(self) -> list[tuple[float, str]]:
        """In the order of time."""
        return sorted(self.lines, key=lambda each: each[0])

    def reach(self, slurm: Cluster, job: str, step: int) -> float | None:
        """Wait until ``step`` is done, or one that is new, in an attempt after the last fault.

        Returns the seconds that it took, or None where the job ends before.
        """
        last = max((index for index, (_, line) in enumerate(self.lines) if "recovery: fault" in line), default=0)
        known = [int(found[1]) for _, line in self.lines[:last] if (found := _STEP.search(line))]
        step, begun, seen, looked = max([step, *(each + 1 for each in known)]), False, last, time.monotonic()
        while True:
            lines = self.lines[seen:]
            seen += len(lines)
            for _, line in lines:
                begun = begun or "of this run, job" in line
                if (found := _STEP.search(line)) is None:
                    continue
                if begun and int(found[1]) >= step:
                    return float(found[2]) / 1000
                # Of an attempt that does not know of the fault yet.
                step = step if begun else max(step, int(found[1]) + 1)
            time.sleep(0.005)
            if time.monotonic() > looked + 2:
                looked = time.monotonic()
                if slurm.job(job).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED"):
                    return None

    def refusal(self) -> str | None:
        """The line with which the ranks refuse their flags."""
        found = re.search(r"sla-megatron: error: (.*)", Path(f"{self.run}.log").read_text())
        return found[1] if found else None

    def complaints(self) -> str:
        """Of the job's log."""
        lines = Path(f"{self.run}.log").read_text().splitlines()
        return "\n".join([line for line in lines if re.search("error|Error", line)][:30] + lines[-10:])

    def _read_on(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self.files[name].open("rb") as file:
            file.seek(self._read[name])
            new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self._read[name] += len(new)
            now = time.time()
            for line in new.decode(errors="replace").splitlines():
                self.lines.append((_daemons_time(line) or now, f"{name} {line}".lstrip() if name else line))
                if not name and "[before the start of training step]" in line:
                    self._first_step_is_next = True
                if not name and self._first_step_is_next and _STEP.search(line):
                    self._first_step_is_next = False
                    for number, pid in enumerate(ranks(self.run)):
                        self.say(f"cpu rank {number}: {cpu_seconds(pid):.2f}")


def _daemons_time(line: str) -> float | None:
    """Slurm's daemons begin each line with the time."""
    found = re.match(r"\[(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+)\]", line)
    return datetime.fromisoformat(found[1]).timestamp() if found else None


@contextlib.contextmanager
def watched(slurm: Cluster, run: Path) -> Iterator[Watch]:
    """A watch that reads for the length of the block."""
    watch = Watch(slurm, run)
    thread = threading.Thread(target=watch.follow)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def ranks(run: Path) -> list[int]:
    """The processes that train: not what launches them, which names the same module."""
    found = []
    for pid in processes_with(_RANK, RUN_DIR=str(run)):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"distributed.run" not in command and b"python" in command.split(b"\0")[0]:
                found.append(pid)
    return sorted(found)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; 0 of one that is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    # proc(5): utime and stime are fields 14 and 15, and the name is the second.
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def cause(slurm: Cluster, run: Path, job: str, kind: str, rng: random.Random, watch: Watch) -> None:
    """One fault.  A node that is set down comes back by itself, since its daemon still answers, but the job is gone."""
    watch.say(f"fault {kind}")
    if kind == "node":
        node = rng.choice(slurm.command("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).split())
        slurm.command("scontrol", "update", f"nodename={node}", "state=down", "reason=benchmark")
        return
    if kind == "damage":
        newest, _ = newest_complete(run / "checkpoints")
        parts = sorted(checkpoints(run / "checkpoints")[newest].glob("*.distcp"))
        part = rng.choice(parts)
        os.truncate(part, part.stat().st_size - 1 - rng.randrange(part.stat().st_size // 2))
    os.kill(rng.choice(ranks(run)), signal.SIGKILL)


def row_of(args: argparse.Namespace, events: list[Event]) -> dict[str, Any]:
    """What a run's events tell."""
    found = attempts(events)
    faults = list(recoveries(found))
    if len(faults) != args.faults:
        sys.exit(f"{len(faults)} of {args.faults} faults were followed by a new step")
    # The first step of an attempt is slower, and a mean of two is printed for the second.
    steps = [milliseconds / 1000 for each in found for _, _, milliseconds in each.steps[2:]]
    wall = found[-1].steps[-1][0] - found[0].marks["requeue"]
    step = statistics.median(steps)
    return {
        "launch": args.launch,
        "async_saves": args.async_saves,
        "faults": faults,
        "attempts": len(found),
        "step_seconds": spread(steps),
        "wall_seconds": wall,
        "useful_fraction": args.iterations * step / wall,
        "first_start_cpu_seconds": sorted(found[0].cpu.values()),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """What each fault cost, and the run as a whole."""
    made = []
    for row in result["rows"]:
        saves = "asynchronous" if row["async_saves"] else "blocking"
        if "refused" in row:
            made.append(Table(f"{row['launch']}, {saves} saves", ["not measured"], [[row["refused"]]]))
            continue
        title = f"Seconds from a fault to the next new step ({row['launch']}, {saves} saves)"
        header = ["part", *(fault["fault"] for fault in row["faults"]), "median"]
        cells = []
        for part, ends in PARTS.items():
            values = [fault["seconds"][part] for fault in row["faults"]]
            cells.append([f"{part} (until {ends})", *(f"{v:.2f}" for v in values), f"{statistics.median(values):.2f}"])
        values = [fault["all_seconds"] for fault in row["faults"]]
        cells.append(["**all**", *(f"{v:.2f}" for v in values), f"{statistics.median(values):.2f}"])
        lost = [fault["lost_steps"] for fault in row["faults"]]
        cells.append(["lost steps", *map(str, lost), f"{statistics.median(lost):g}"])
        cpu = [statistics.mean(fault["rank_cpu_seconds"] or [float("nan")]) for fault in row["faults"]]
        cells.append(["CPU seconds of a rank until its first step", *(f"{v:.1f}" for v in cpu)])
        cells[-1].append(f"{statistics.median(cpu):.1f}")
        note = (
            f"A step takes {shown(row['step_seconds'])} s; {row['wall_seconds']:.0f} s from the first start to the "
            f"end, of which {row['useful_fraction']:.1%} were useful. {result['settings'].get('note', '')}"
        )
        made.append(Table(title, header, cells, note=note.strip()))
    return made


if __name__ == "__main__":
    main()
