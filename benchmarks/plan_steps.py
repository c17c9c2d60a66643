"""What ``sla-plan`` predicts of a step with the rates that ``sla-doctor --rates`` measures, beside real steps.

    python -m benchmarks.plan_steps

Starts ranks of this machine, which are a pipeline, for each layout, and for two ranks also in network namespaces of
their own with a slow line between them (root only).  In each round the ranks first measure the rates, as the doctor
does, then train: forward and backward passes of all microbatches, dense and skip-layer in turns; the first step of each
is left out.  The flags that the doctor prints, beside those of the job, are sla-plan's.  What it does not model is not
in the steps: the optimizer's part is timed by itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from sla_megatron.common.flag_types import count
from sla_megatron.common.silence import silence

from .record import ROOT, Table, add_output_args, check_output, shown, spread, write_result
from .slow_link import End, NotAllowed, slow_link

#: How far a prediction may be off.
AIM = 0.15

MODELS = {"sla": "SLA", "dense": "dense"}


@dataclass(frozen=True)
class Case:
    """A pipeline of ``ranks`` with ``chunks`` virtual stages each; ``is_slow``: its line is."""

    ranks: int
    chunks: int = 1
    is_slow: bool = False

    @property
    def name(self) -> str:
        """Such as ``PP=2 x VPP=2``."""
        return f"PP={self.ranks}" + (f" x VPP={self.chunks}" if self.chunks > 1 else "")


CASES = {
    "pp2": Case(2),
    "pp2-vpp2": Case(2, 2),
    "pp2-slow": Case(2, 1, True),
    "pp2-vpp2-slow": Case(2, 2, True),
    "pp4": Case(4),
}


def main() -> None:
    """Parse the flags; measure all cases, or be a rank of one."""
    parser = _parser()
    args = parser.parse_args()
    # Megatron warns of each model that it builds.
    logging.disable(logging.WARNING)
    if args.rank_answer is not None:
        _be_a_rank(args)
        return
    check_output(parser, args)
    cases = [CASES[name] for name in args.cases]
    # Those that follow each other on the same ranks need them started once.
    rows = [
        row for _, same in groupby(cases, lambda case: (case.ranks, case.is_slow)) for row in rows_of(args, [*same])
    ]
    args.rank_answer = args.jobs = None
    write_result(args, "plan", "cpu", rows, tables)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.plan_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_output_args(parser, "plan")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    for name, default in (("layers", 8), ("hidden", 256), ("heads", 8), ("seq-length", 256), ("microbatches", 8)):
        parser.add_argument(f"--{name}", type=count(f"--{name}"), default=default, help=f"default: {default}")
    parser.add_argument("--rounds", type=count("--rounds"), default=2, help="rates, then steps (default: 2)")
    parser.add_argument("--steps", type=count("--steps"), default=3, help="timed in a round, of each (default: 3)")
    parser.add_argument("--megabits", type=count("--megabits"), default=100, help="of the slow line (default: 100)")
    parser.add_argument("--rank-answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", nargs="+", help=argparse.SUPPRESS)
    return parser


def job_flags(args: argparse.Namespace, case: Case) -> list[str]:
    """Megatron's flags of the skip-layer job; the dense one's are those without ``--sla``."""
    flags = f"--sla --num-layers {args.layers} --hidden-size {args.hidden} --num-attention-heads {args.heads}"
    flags += f" --seq-length {args.seq_length} --max-position-embeddings {args.seq_length} --micro-batch-size 1"
    flags += f" --global-batch-size {args.microbatches} --pipeline-model-parallel-size {case.ranks}"
    flags += " --mock-data --tokenizer-type NullTokenizer --vocab-size 1023 --lr 1e-4 --device cpu"
    flags += " --hidden-dropout 0 --attention-dropout 0"
    if case.chunks > 1:
        flags += f" --num-layers-per-virtual-pipeline-stage {args.layers // (case.ranks * case.chunks)}"
    return flags.split()


def rows_of(args: argparse.Namespace, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row for each case and model; all cases are of the same ranks."""
    jobs = [job_flags(args, case) for case in cases]
    ranks, is_slow = cases[0].ranks, cases[0].is_slow
    link = f"{args.megabits} Mbit/s" if is_slow else "loopback"
    with ExitStack() as stack:
        try:
            ends = stack.enter_context(slow_link(args.megabits)) if is_slow else [End()] * ranks
        except NotAllowed as reason:
            return [
                {"layout": case.name, "link": link, "not_measured": f"not allowed here: {reason}"} for case in cases
            ]
        answers = _answers_of_ranks(args, jobs, ends)
    return [
        row
        for case, flags, rounds in zip(cases, jobs, answers, strict=True)
        for row in _rows(case, link, flags, rounds)
    ]


def _rows(case: Case, link: str, flags: Sequence[str], rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    common = {"layout": case.name, "link": link, "job": shlex.join(flags)}
    predicted = [_predicted(flags, one["plan_flags"]) for one in rounds]
    for ahead, one in zip(predicted, rounds, strict=True):
        steps = ", ".join(
            f"{MODELS[name]} {ahead[name]:.3f} for {median(one['seconds'][name]):.3f} s" for name in MODELS
        )
        print(f"{case.name}, {link}: {one['summary']}; predicted {steps}", file=sys.stderr, flush=True)
    rows = []
    for name in MODELS:
        steps = [one["seconds"][name] for one in rounds]
        foreseen = [one[name] for one in predicted]
        rows.append(
            common
            | {
                "model": name,
                "plan_flags": [one["plan_flags"] for one in rounds],
                "rates": {
                    what: spread([float(one["plan_flags"].split(f"--{what} ")[1].split()[0]) for one in rounds])
                    for what in ("link-gb-per-s", "link-latency-us", "compute-tflops")
                },
                "measuring_seconds": spread([one["measuring_seconds"] for one in rounds]),
                "seconds": spread([step for one in steps for step in one]),
                "optimizer_seconds": spread([step for one in rounds for step in one["optimizer_seconds"][name]]),
                "predicted_seconds": spread(foreseen),
                # Rates and steps of the same round.
                "predicted_over_measured": spread(
                    [ahead / median(real) for ahead, real in zip(foreseen, steps, strict=True)]
                ),
            }
        )
    return rows


def _predicted(flags: Sequence[str], plan_flags: str) -> dict[str, float]:
    """Seconds of a step as ``sla-plan`` has them with these flags."""
    from sla_megatron.commands.plan.flags import add_plan_args, rates
    from sla_megatron.commands.plan.predict import predict
    from sla_megatron.commands.plan.settle import settled_job

    asked, _ = add_plan_args(argparse.ArgumentParser(allow_abbrev=False)).parse_known_args(plan_flags.split())
    before, sys.argv = sys.argv, ["sla-plan", *flags, *plan_flags.split()]
    try:
        prediction = predict(settled_job(), rates(asked))
    finally:
        sys.argv = before
    return {"sla": prediction.sla.step_time, "dense": prediction.dense.step_time}


def _answers_of_ranks(
    args: argparse.Namespace, jobs: Sequence[Sequence[str]], ends: Sequence[End]
) -> list[list[dict[str, Any]]]:
    """Run a rank at each of ``ends``; of each job the rounds as rank 0 saw them."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": ends[0].address, "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.plan_steps", "--rank-answer", str(answer)]
        command += ["--jobs", *map(shlex.join, jobs), "--rounds", str(args.rounds), "--steps", str(args.steps)]
        ranks = []
        for rank, end in enumerate(ends):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(ends))}
            place |= {"GLOO_SOCKET_IFNAME": end.interface, "PYTHONWARNINGS": "ignore"}
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | meeting | place
            with (Path(folder) / f"{rank}.log").open("w") as log:
                ranks.append(
                    subprocess.Popen([*end.prefix, *command], env=environment, cwd=ROOT, stdout=log, stderr=log)
                )
        try:
            statuses = [rank.wait(timeout=600) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(statuses):
            logs = [(Path(folder) / f"{rank}.log").read_text()[-3000:] for rank in range(len(ends))]
            sys.exit("\n".join([*logs, f"benchmarks.plan_steps: error: the ranks ended with {statuses}"]))
        return json.loads(answer.read_text())


def _be_a_rank(args: argparse.Namespace) -> None:
    from sla_megatron.cpu.device import megatron_device

    rank = int(os.environ["RANK"])
    with megatron_device(["--device", "cpu"]):
        import torch

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(address, port, is_master=rank == 0, timeout=timedelta(seconds=300))
        answers = [
            _rounds(args, shlex.split(job), torch.distributed.PrefixStore(str(number), store))
            for number, job in enumerate(args.jobs)
        ]
        if rank == 0:
            args.rank_answer.write_text(json.dumps(answers))


def _rounds(args: argparse.Namespace, flags: Sequence[str], store: Any) -> list[dict[str, Any]]:
    """All rounds of one job."""
    from sla_megatron.commands.doctor.layout import model_parallel

    from .training_steps import TrainingSteps, settle

    with silence():
        jobs = {"sla": settle(flags), "dense": settle([flag for flag in flags if flag != "--sla"])}
    with model_parallel(jobs["sla"], store, 300, lambda step: None):
        with silence():
            steps = {name: TrainingSteps(job) for name, job in jobs.items()}
        return [_round(args, jobs["sla"], steps) for _ in range(args.rounds)]


def _round(args: argparse.Namespace, job: argparse.Namespace, models: dict[str, Any]) -> dict[str, Any]:
    """The rates as the doctor measures and prints them, and the seconds of steps."""
    from torch.distributed import barrier

    from sla_megatron.commands.doctor.rates import measure, plan_flags, summary

    start = time.perf_counter()
    measured = measure(job)
    found: dict[str, Any] = {"plan_flags": plan_flags(measured), "summary": summary(measured)}
    found["measuring_seconds"] = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    optimizer: dict[str, list[float]] = {name: [] for name in MODELS}
    for step in range(args.steps + 1):
        for name, model in models.items():
            barrier()
            begin = time.perf_counter()
            model.passes()
            barrier()
            middle = time.perf_counter()
            model.optimizer.step()
            barrier()
            if step:
                seconds[name].append(middle - begin)
                optimizer[name].append(time.perf_counter() - middle)
    return found | {"seconds": seconds, "optimizer_seconds": optimizer}


def tables(result: dict[str, Any]) -> list[Table]:
    """One row a layout, link and model."""
    cells = []
    for row in result["rows"]:
        if "not_measured" in row:
            cells.append((row["layout"], row["link"], row["not_measured"], *[""] * 7))
            continue
        off = row["predicted_over_measured"]["median"] - 1
        cells.append(
            (
                row["layout"],
                row["link"],
                MODELS[row["model"]],
                *(f"{row['rates'][what]['median']:.3g}" for what in ("link-gb-per-s", "link-latency-us")),
                f"{row['rates']['compute-tflops']['median'] * 1e3:.3g}",
                shown(row["seconds"]),
                shown(row["predicted_seconds"]),
                shown(row["predicted_over_measured"]),
                "yes" if abs(off) <= AIM else "no",
            )
        )
    header = ("layout", "link", "model", "GB/s", "us", "GFLOP/s", "measured, s", "predicted, s", "predicted / measured")
    settings = result["settings"]
    note = (
        "Rates: sla-doctor --rates, on the same ranks, in the same round. Median (least-most): of steps, of rounds. "
        f"All ranks share the machine's {result['machine']['cores']} cores, a thread each: with as many ranks as cores "
        "or more, what a rank achieves depends on how many compute at a time."
    )
    title = (
        f"Steps of {settings['microbatches']} microbatches, {settings['layers']} layers of {settings['hidden']}, "
        f"{settings['seq_length']} tokens: predicted and real"
    )
    return [Table(title, (*header, f"within {AIM:.0%}"), cells, left=(0, 1, 2), note=note)]


if __name__ == "__main__":
    main()
