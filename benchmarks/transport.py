"""What skip-layer K/V cost between pipeline stages: bytes and seconds a hop, step time, resident memory.

    python -m benchmarks.transport --ranks 2

Starts its own ranks, or is started on them, as by ``torchrun --nproc-per-node 4 -m benchmarks.transport``; each is a
pipeline rank.  For each layout a dense and a skip-layer model live in the same processes and take turns, step by step;
the first steps (``--warmup``) are left out.  Bytes handed to isend are counted.  They must be those of the lower bound,
which is computed here by its formula; if they are not, the command ends with status 1.  A transfer of each hop's
payload is timed between its two ranks, in turns with that of a dense model, of K/V relayed over every hop, and of every
hop padded to the widest.  Ratios are of pairs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from sla_megatron.attention.sla_config import default_skip_distance
from sla_megatron.common.errors import FlagError, one_line_errors
from sla_megatron.common.flag_types import count
from sla_megatron.common.launchers import torchrun
from sla_megatron.cpu.device import add_device_arg, megatron_device

from .pipeline_models import Shape
from .record import Table, add_output_args, check_output, save_figure, shown, write_result

WAYS = {"dense": "dense", "sla": "SLA", "relay": "relayed", "padded": "padded"}


def main() -> None:
    """Parse the flags; start the ranks, or be one of them."""
    parser = _parser()
    with one_line_errors():
        args = parser.parse_args()
        is_rank = "RANK" in os.environ
        if is_rank:
            args.ranks = int(os.environ["WORLD_SIZE"])
        shapes = shapes_of(args)
    if os.environ.get("RANK", "0") == "0":
        check_output(parser, args)
    if not is_rank:
        start_ranks(args.ranks)
    # Megatron warns of each model that it builds.
    logging.disable(logging.WARNING)
    with megatron_device() as device:
        from . import transport_ranks

        transport_ranks.start(device)
        rows = [transport_ranks.measure(args, shape, device) for shape in shapes]
        finish(args, rows, device)


def _parser() -> argparse.ArgumentParser:
    parser = add_output_args(
        argparse.ArgumentParser(
            prog="benchmarks.transport", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ),
        "transport",
    )
    parser.add_argument("--ranks", type=count("--ranks", 2), default=2, help="to start (default: 2)")
    parser.add_argument(
        "--virtual-stages", type=count("--virtual-stages"), nargs="+", metavar="V", help="a rank (default: 1 2 4)"
    )
    for name, default in (("layers", 16), ("hidden", 256), ("heads", 8), ("seq-length", 256), ("microbatches", 4)):
        parser.add_argument(f"--{name}", type=count(f"--{name}"), default=default, help=f"default: {default}")
    parser.add_argument("--distance", type=count("--distance"), help="of the skips (default: 3/4 of the layers)")
    parser.add_argument("--steps", type=count("--steps"), default=10, help="timed, of each model (default: 10)")
    parser.add_argument(
        "--transfers", type=count("--transfers"), default=30, help="timed, of each payload (default: 30)"
    )
    parser.add_argument("--warmup", type=count("--warmup", 0), default=2, help="of both, left out (default: 2)")
    return add_device_arg(parser)


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """One for each number of virtual stages.  Raises ``FlagError`` for sizes that do not divide."""
    if args.hidden % args.heads:
        raise FlagError("--heads", args.heads, f"a divisor of --hidden {args.hidden}")
    args.distance = args.distance or default_skip_distance(args.layers)
    if args.distance >= args.layers:
        raise FlagError("--distance", args.distance, f"less than --layers {args.layers}")
    chosen = args.virtual_stages or [v for v in (1, 2, 4) if not args.layers % (args.ranks * v)]
    if not chosen:
        raise FlagError("--layers", args.layers, f"a multiple of --ranks {args.ranks}")
    for chunks in chosen:
        if args.layers % (args.ranks * chunks):
            raise FlagError("--virtual-stages", chunks, f"--layers {args.layers} to divide by {args.ranks} times it")
        if chunks > 1 and args.microbatches % args.ranks:
            raise FlagError("--microbatches", args.microbatches, f"a multiple of {args.ranks} with virtual stages")
    sizes = (args.layers, args.hidden, args.heads, args.seq_length, args.distance, args.microbatches)
    return [Shape(*sizes, ranks=args.ranks, chunks=chunks) for chunks in chosen]


def start_ranks(ranks: int) -> NoReturn:
    """Become the launcher of this command on ``ranks`` processes of this machine: what ends it ends them."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    # The last: torch's profiler, which counts allocations on the CPU, says when it starts and stops.
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", "KINETO_LOG_LEVEL": "99"}
    os.execve(sys.executable, [*torchrun(ranks), "-m", "benchmarks.transport", *sys.argv[1:]], environment | os.environ)


def finish(args: argparse.Namespace, rows: list[dict[str, Any]], device: str) -> None:
    """On rank 0 write the result; end with status 1 where bytes are not those of the bound."""
    import torch

    if torch.distributed.get_rank() == 0:
        write_result(args, "transport", torch.cuda.get_device_name() if device == "cuda" else "cpu", rows, tables, plot)
        # The ranks' launcher says of the others only that they were ended.
        for line in (wrong := list(chain.from_iterable(map(differences, rows)))):
            print(f"benchmarks.transport: error: {line}", file=sys.stderr, flush=True)
    else:
        wrong = []
    torch.distributed.destroy_process_group()
    if wrong:
        sys.exit(1)


def differences(row: dict[str, Any]) -> list[str]:
    """A line for each hop, model and direction in which other bytes were sent than the bound, or planned."""
    found = []
    for hop in row["hops"]:
        for name, bound in (("dense", hop["hidden_bytes"]), ("sla", hop["hidden_bytes"] + hop["kv_bound_bytes"])):
            for direction, sizes in hop["sent_bytes"][name].items():
                if sizes != [bound]:
                    found.append(f"{row['layout']}, hop {hop['hop']}, {name}, {direction}: sent {sizes}, bound {bound}")
        planned, bound = hop["kv_planned_bytes"], hop["kv_bound_bytes"]
        if planned != bound:
            found.append(f"{row['layout']}, hop {hop['hop']}: K/V planned {planned}, bound {bound}")
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    """Bytes a hop, seconds a hop, whole steps, and memory."""
    rows, device = result["rows"], result["machine"]["device"]
    return [_bytes_table(rows), _seconds_table(rows, device), _step_table(rows, device), _memory_table(rows)]


def _bytes_table(rows: list[dict[str, Any]]) -> Table:
    cells = []
    for row in rows:
        for hop in row["hops"]:
            bound = hop["hidden_bytes"] + hop["kv_bound_bytes"]
            sent = hop["sent_bytes"]["sla"]
            is_bound = sent["forward"] == sent["backward"] == [bound]
            sizes = (hop["hidden_bytes"], hop["kv_bound_bytes"], hop["kv_planned_bytes"], bound)
            cells.append(
                (
                    row["layout"],
                    f"{hop['hop']} ({hop['source_rank']} to {hop['target_rank']})",
                    *map(str, sizes),
                    str(bound) if is_bound else f"{sent['forward']} and {sent['backward']}",
                    f"{hop['relay_bytes'] / bound:.3f}",
                    f"{hop['padded_bytes'] / bound:.3f}",
                )
            )
    header = (
        "layout",
        "hop",
        "hidden",
        "K/V, bound",
        "K/V, planned",
        "bound",
        "sent",
        "relayed / sent",
        "padded / sent",
    )
    note = "Sent: measured, forward and backward. Relayed, padded: what the planner gives for the ways not taken."
    return Table("Bytes a hop and microbatch", header, cells, left=(0, 1), note=note)


def _seconds_table(rows: list[dict[str, Any]], device: str) -> Table:
    cells = []
    for row in rows:
        for hop in row["hops"]:
            cells.append(
                (
                    row["layout"],
                    f"{hop['hop']} ({hop['source_rank']} to {hop['target_rank']})",
                    str(hop["seconds"]["sla"]["n"]),
                    *(shown({k: v * 1e3 for k, v in hop["seconds"][way].items()}) for way in WAYS),
                    f"{planned_seconds(hop) * 1e3:.3f}",
                    *(f"{hop['seconds_over_sla'][way]['median']:.3f}" for way in WAYS if way != "sla"),
                )
            )
    ratios = [f"{label} / SLA" for way, label in WAYS.items() if way != "sla"]
    header = ("layout", "hop", "runs", *(f"{label}, ms" for label in WAYS.values()), "SLA, planned", *ratios)
    note = (
        "Half of a round trip of a tensor of the payload's size between the two ranks. Median (least-most). Planned: "
        "the planner's time for SLA's bytes at the rate of the dense transfer."
    )
    return Table(f"Seconds a hop: {device}", header, cells, left=(0, 1), note=note)


def planned_seconds(hop: dict[str, Any]) -> float:
    """``sla-plan``'s time of the hop (``Rates``, without latency), the link being as fast as the dense transfer was."""
    rate = hop["hidden_bytes"] / hop["seconds"]["dense"]["median"]
    return (hop["hidden_bytes"] + hop["kv_planned_bytes"]) / rate


def _step_table(rows: list[dict[str, Any]], device: str) -> Table:
    cells = [
        (
            row["layout"],
            str(row["num_steps"]),
            *(shown(row["seconds"][name], 4) for name in ("dense", "sla")),
            shown(row["ratio"]),
            f"{row['sent_bytes']['sla'] / row['sent_bytes']['dense']:.3f}",
            str(row["synchronisations"]["sla"] - row["synchronisations"]["dense"]),
        )
        for row in rows
    ]
    header = ("layout", "steps", "dense, s", "SLA, s", "SLA / dense", "bytes, SLA / dense", "host waits added")
    note = "Median (least-most); SLA / dense of the pairs of steps that follow each other."
    return Table(f"Whole steps: {device}, distance {rows[0]['distance']}", header, cells, note=note)


def _memory_table(rows: list[dict[str, Any]]) -> Table:
    cells = [
        (
            row["layout"],
            str(rank["rank"]),
            str(rank["resident_bytes"]),
            str(rank["resident_planned_bytes"]),
            *(f"{rank['step_peak_bytes'][name] / 1e6:.2f}" for name in ("dense", "sla")),
        )
        for row in rows
        for rank in row["ranks"]
    ]
    header = ("layout", "rank", "resident K/V, bytes", "planned", "a dense step, MB", "an SLA step, MB")
    note = (
        "At the schedule's peak; a step: the most that it allocates beyond what is there before it. One step of each."
    )
    return Table("Memory of each rank", header, cells, left=(0, 1), note=note)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bytes and milliseconds of every hop, of each way."""
    from matplotlib import pyplot

    hops = [(row["layout"], hop) for row in result["rows"] for hop in row["hops"]]
    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(max(6, 0.7 * len(hops)), 5.5), layout="constrained")
    for place, (way, label) in enumerate(WAYS.items()):
        at = [x + 0.2 * (place - 1.5) for x in range(len(hops))]
        axes[0].bar(at, [_payload(hop, way) / 1e3 for _, hop in hops], 0.2, label=label)
        seconds = [hop["seconds"][way] for _, hop in hops]
        middle = [each["median"] * 1e3 for each in seconds]
        axes[1].bar(at, middle, 0.2)
    axes[0].set_ylabel("kB a microbatch")
    axes[1].set_ylabel("ms a transfer (median)")
    axes[1].set_xticks(range(len(hops)), [f"{name}\nhop {hop['hop']}" for name, hop in hops], fontsize="x-small")
    axes[0].legend(ncols=4, fontsize="small")
    save_figure(figure, path)
    pyplot.close(figure)


def _payload(hop: dict[str, Any], way: str) -> int:
    """Bytes; for skip-layer attention and dense those that were sent."""
    if way in ("dense", "sla"):
        return max(hop["sent_bytes"][way]["forward"])
    return hop[f"{way}_bytes"]


if __name__ == "__main__":
    main()
