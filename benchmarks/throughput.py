"""Training speed and memory: dense, ``full`` and ``pruned`` skip-layer attention, step by step in turns.

    python -m benchmarks.throughput --models small --contexts 512 1024
    python -m benchmarks.throughput --models gpt2-124m --contexts 1024 4096 16384 --core-attention sdpa   # one GPU
    python -m benchmarks.throughput --models small --contexts 512 --layouts 2x1 2x2 --microbatches 4      # two ranks

A step is Megatron's: forward and backward passes of all microbatches, gradient finalisation, optimizer.  The models of
a row live in the same processes and take turns in an order that rotates, so that the machine's drift cancels: a ratio
is the median over rounds of dense seconds over this model's in the same round.  Its bounds are the middle half of the
rounds.  The first rounds (``--warmup``) are left out.  Memory is what torch allocates: what a model and its optimizer
hold, and the most during a step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.flag_types import count
from sla_megatron.cpu.device import add_device_arg, megatron_device

from .allocations import allocations
from .heap import keep_freed_memory
from .ranks import answer_of_ranks
from .record import Table, add_output_args, check_output, save_figure, shown, spread, write_result
from .training_steps import VARIANTS, TrainingSteps, model_flags, settle

NAME = "throughput"


def main() -> None:
    """Measure every model, context and layout, and write ``--out``."""
    parser = make_parser()
    with one_line_errors():
        args = parser.parse_args()
    if args.rank_answer is not None:
        measure_on_rank(args)
        return
    check_output(parser, args)
    check(parser, args)
    rows: list[dict[str, Any]] = []
    device = ""
    for layout in args.layouts:
        for model in args.models:
            for context in args.contexts:
                print(f"{model}, context {context}, {layout}: {args.rounds} rounds", flush=True)
                device, found = measure(args, layout, model, context)
                rows += found
    write_result(args, NAME, device, rows, tables, plot)


def make_parser() -> argparse.ArgumentParser:
    """Of the command and of the ranks that it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small"], metavar="NAME", help="small models, or presets")
    parser.add_argument("--contexts", nargs="+", type=count("--contexts", 2), default=[512], metavar="TOKENS")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="dense is always run")
    parser.add_argument(
        "--layouts", nargs="+", default=["1x1"], metavar="PxV", help="pipeline ranks x virtual stages (default: 1x1)"
    )
    parser.add_argument("--microbatches", type=count("--microbatches"), default=1, help="of a step (default: 1)")
    parser.add_argument("--micro-batch-size", type=count("--micro-batch-size"), default=1, help="samples (default: 1)")
    parser.add_argument("--rounds", type=count("--rounds"), default=15, help="timed steps of each model (default: 15)")
    parser.add_argument("--warmup", type=count("--warmup", 0), default=3, help="left out before them (default: 3)")
    parser.add_argument("--core-attention", default="sdpa", choices=("megatron", "sdpa"))
    parser.add_argument("--flags", default="", help="more of Megatron's flags, in one word, for every model")
    # What the ranks are told: where rank 0 answers.
    parser.add_argument("--rank-answer", type=Path, help=argparse.SUPPRESS)
    return add_output_args(add_device_arg(parser), NAME)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line where a value cannot be."""
    for layout in args.layouts:
        parts = layout.split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
            parser.error(f"--layouts {layout}: expected pipeline ranks x virtual stages, such as 1x1 or 4x2")
        if parts[0] == "1" and parts[1] != "1":
            parser.error(f"--layouts {layout}: expected virtual stages on 2 ranks or more")
    for model in args.models:
        try:
            model_flags(model)
        except ValueError as error:
            parser.error(str(error))


def measure(args: argparse.Namespace, layout: str, model: str, context: int) -> tuple[str, list[dict[str, Any]]]:
    """Start the ranks of a layout; the device and the rows that rank 0 answers."""
    ranks = int(layout.split("x")[0])
    flags = ["--models", model, "--contexts", str(context), "--layouts", layout, "--variants", *args.variants]
    for name in ("microbatches", "micro_batch_size", "rounds", "warmup", "core_attention", "device"):
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    # The last: torch's profiler, which counts allocations on the CPU, says when it starts and stops.
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)), "KINETO_LOG_LEVEL": "99"}
    label = f"{NAME}: {model}, context {context}, {layout}"
    found = answer_of_ranks("benchmarks.throughput", ranks, [*flags, f"--flags={args.flags}"], environment, label)
    return found["device"], found["rows"]


def measure_on_rank(args: argparse.Namespace) -> None:
    """One rank's part; the first writes all rows."""
    logging.disable(logging.WARNING)
    (layout,), (model,), (context,) = args.layouts, args.models, args.contexts
    keep_freed_memory()
    with megatron_device(["--device", args.device]) as device:
        import torch
        from megatron.core import parallel_state, tensor_parallel

        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        stages, chunks = map(int, layout.split("x"))
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        wanted = dict.fromkeys(["dense", *args.variants])
        models, memory = {}, {}
        for variant in wanted:
            models[variant], memory[variant] = built(args, device, variant)
        times = timed(models, args.warmup, args.rounds, device)
        what = {"model": model, "context": context, "layout": layout}
        what["dtype"] = str(models["dense"].args.params_dtype).removeprefix("torch.")
        rows = [what | row_of(variant, models, times, memory[variant]) for variant in wanted]
        if torch.distributed.get_rank() == 0:
            name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
            args.rank_answer.write_text(json.dumps({"device": name, "rows": rows}))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def built(args: argparse.Namespace, device: str, variant: str) -> tuple[TrainingSteps, dict[str, int]]:
    """One variant of the model, after its first steps; bytes that it holds, and the most in a step beyond those."""
    stages, chunks = map(int, args.layouts[0].split("x"))
    flags = [*model_flags(args.models[0]), *(["--bf16"] if device == "cuda" else []), *VARIANTS[variant]]
    values = {
        "--seq-length": args.contexts[0],
        "--max-position-embeddings": args.contexts[0],
        "--micro-batch-size": args.micro_batch_size,
        "--global-batch-size": args.microbatches * args.micro_batch_size,
        "--train-iters": 1,
        "--pipeline-model-parallel-size": stages,
        "--core-attention": args.core_attention,
    }
    if args.core_attention == "sdpa":
        values["--transformer-impl"] = "local"
    if chunks > 1:
        values["--num-virtual-stages-per-pipeline-rank"] = chunks
    flags += [str(word) for flag in values.items() for word in flag] + args.flags.split()
    with contextlib.redirect_stdout(io.StringIO()), allocations(device) as held:
        model = TrainingSteps(settle(flags))
        model.step()
    with allocations(device) as step:
        model.step()
    return model, {"held_bytes": held.kept, "step_bytes": step.peak, "peak_bytes": held.kept + step.peak}


def timed(models: dict[str, TrainingSteps], warmup: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each model's steps, in rounds; the first ``warmup`` rounds are left out."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(warmup + rounds):
        names = list(models)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            torch.distributed.barrier()
            start = time.perf_counter()
            models[name].step()
            if device == "cuda":
                torch.cuda.synchronize()
            torch.distributed.barrier()
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def row_of(
    variant: str, models: dict[str, TrainingSteps], times: dict[str, list[float]], memory: dict[str, int]
) -> dict[str, Any]:
    """What rank 0 reports of one model; memory is that of the rank that has most of it."""
    import torch

    model = models[variant]
    ratios = [dense / own for dense, own in zip(times["dense"], times[variant], strict=True)]
    counted = torch.tensor([model.parameters, *memory.values()], device="cuda")
    most = counted.clone()
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(counted)
    seconds = spread(times[variant])
    return {
        "variant": variant,
        "tokens_a_step": model.tokens,
        "microbatches": model.microbatches,
        "parameters": int(counted[0]),
        "flops_a_step": model.operations,
        "seconds": seconds,
        "tokens_a_second": model.tokens / seconds["median"],
        "speed_over_dense": middle(ratios),
        "sent_bytes_a_step": model.sent_bytes,
        **{name: int(value) for name, value in zip(memory, most[1:], strict=True)},
    }


def middle(values: list[float]) -> dict[str, float]:
    """Median and the middle half: single rounds that the machine disturbed are outside of it."""
    lower, _, upper = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"n": len(values), "median": statistics.median(values), "min": lower, "max": upper}


def tables(result: dict[str, Any]) -> list[Table]:
    """One table for each layout."""
    found = []
    for layout in dict.fromkeys(row["layout"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["layout"] == layout]
        stages, chunks = layout.split("x")
        title = "one rank" if stages == "1" else f"PP={stages}" + (f" x VPP={chunks}" if chunks != "1" else "")
        found.append(Table(f"Training, {title}", HEADER, [cells(row, result["rows"]) for row in rows], left=(0, 2)))
    return found


HEADER = (
    "model", "context", "attention", "parameters", "TFLOP a step", "sent MB a step", "s a step", "tokens/s",
    "speed / dense", "peak MB", "peak / dense", "rounds",
)  # fmt: skip


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """One line of the table."""
    is_dense = row["variant"] == "dense"
    return [
        row["model"],
        f"{row['context']}",
        row["variant"],
        f"{row['parameters'] / 1e6:.1f}M",
        f"{row['flops_a_step'] / 1e12:.3g}",
        f"{row['sent_bytes_a_step'] / 1e6:.1f}",
        f"{row['seconds']['median']:.3f}",
        f"{row['tokens_a_second']:.0f}",
        "1" if is_dense else shown(row["speed_over_dense"]),
        f"{row['peak_bytes'] / 1e6:.1f}",
        "1" if is_dense else f"{peak_over_dense(row, rows):.3f}",
        f"{row['seconds']['n']}",
    ]


def peak_over_dense(row: dict[str, Any], rows: Iterable[dict[str, Any]]) -> float:
    """Peak memory of a row over that of the dense model among ``rows``."""
    same = ("model", "context", "layout")
    dense = next(r for r in rows if r["variant"] == "dense" and all(r[what] == row[what] for what in same))
    return row["peak_bytes"] / dense["peak_bytes"]


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed over dense against context, a panel for each model and layout."""
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row["model"], row["layout"]) for row in result["rows"]))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False, sharey=True)
    for axis, (model, layout) in zip(axes[0], panels, strict=True):
        for variant in ("full", "pruned"):
            rows = [r for r in result["rows"] if (r["model"], r["layout"], r["variant"]) == (model, layout, variant)]
            if not rows:
                continue
            ratios = [row["speed_over_dense"] for row in rows]
            medians = [ratio["median"] for ratio in ratios]
            bounds = [
                [ratio["median"] - ratio["min"] for ratio in ratios],
                [ratio["max"] - ratio["median"] for ratio in ratios],
            ]
            axis.errorbar([row["context"] for row in rows], medians, bounds, marker="o", capsize=3, label=variant)
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlabel="context", title=f"{model}, {layout}")
        axis.set_xticks(result["settings"]["contexts"], [str(c) for c in result["settings"]["contexts"]])
        axis.minorticks_off()
    axes[0][0].set_ylabel("tokens/s over dense")
    axes[0][0].legend()
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
