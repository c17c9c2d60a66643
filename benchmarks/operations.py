"""Operations and bytes of a training step and of a decoded token: dense against skip-layer attention, counted.

    python -m benchmarks.operations

What torch dispatches is counted, views and allocations left out, so the figures are exact, the same on every machine,
and the same in every run.  A small model on a fast GPU takes the time that starting its operations takes; a large one
that of moving bytes.  A step is forward, backward and optimizer of one microbatch; of the ranks of a pipeline, all are
summed; with tensor parallelism it is the first rank's.  What autograd keeps from forward to backward is counted as the
storages that it saves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sla_megatron.common.errors import FlagError, one_line_errors
from sla_megatron.common.flag_types import count
from sla_megatron.cpu.device import add_device_arg, megatron_device

from .models import METHODS
from .ranks import answer_of_ranks
from .record import Table, add_output_args, check_output, write_result
from .training_steps import TrainingSteps, model_flags, settle

NAME = "operations"

#: Name -> tensor-parallel size, pipeline ranks, virtual stages.
LAYOUTS = {"1": (1, 1, 1), "tp2": (2, 1, 1), "2x1": (1, 2, 1), "2x2": (1, 2, 2)}

#: A pipeline stage's: unpacking what arrives and fetching what waits there; keeping what waits, and packing.
ENDS = ("enter", "leave")


def main() -> None:
    """Count every model, layout and variant, and write ``--out``."""
    parser = make_parser()
    with one_line_errors():
        args = parser.parse_args()
    for model in args.models:
        try:
            model_flags(model)
        except ValueError as error:
            parser.error(str(error))
    if args.rank_answer is not None:
        count_on_rank(args)
        return
    check_output(parser, args)
    rows, device = [], ""
    for ranks in (1, 2):
        layouts = [name for name in args.layouts if LAYOUTS[name][0] * LAYOUTS[name][1] == ranks]
        if layouts:
            print(f"{', '.join(args.models)}: {', '.join(layouts)}", flush=True)
            device, found = on_ranks(args, ranks, layouts)
            rows += found
    if not args.no_decoding:
        from .decoding_operations import decoding_rows

        rows += decoding_rows()
    write_result(args, NAME, device, rows, tables)


def make_parser() -> argparse.ArgumentParser:
    """Of the command and of the ranks that it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small", "small-rope-gqa"], metavar="NAME")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--context", type=count("--context", 2), default=512, help="tokens (default: 512)")
    parser.add_argument(
        "--methods", nargs="*", default=[], choices=LAYOUTS, help="layouts that also count other shares and sources"
    )
    parser.add_argument("--no-decoding", action="store_true", help="leave the rows of decoding out")
    parser.add_argument("--rank-answer", type=Path, help=argparse.SUPPRESS)
    return add_output_args(add_device_arg(parser), NAME)


def on_ranks(args: argparse.Namespace, ranks: int, layouts: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """Start ranks; the device and the rows that the first answers."""
    flags = ["--models", *args.models, "--layouts", *layouts, "--context", str(args.context), "--device", args.device]
    flags += ["--methods", *args.methods]
    label = f"{NAME}: {ranks} ranks"
    found = answer_of_ranks("benchmarks.operations", ranks, flags, {"OMP_NUM_THREADS": "1"}, label)
    return found["device"], found["rows"]


def count_on_rank(args: argparse.Namespace) -> None:
    """One rank's part; the first writes all rows."""
    logging.disable(logging.WARNING)
    with megatron_device(["--device", args.device]) as device:
        import torch
        from megatron.core import parallel_state, tensor_parallel

        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        rows = []
        for layout in args.layouts:
            tensor, stages, chunks = LAYOUTS[layout]
            parallel_state.initialize_model_parallel(tensor, stages, chunks if chunks > 1 else None)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            for model in args.models:
                rows += counted(args, device, layout, model)
            parallel_state.destroy_model_parallel()
        if torch.distributed.get_rank() == 0:
            name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
            args.rank_answer.write_text(json.dumps({"device": name, "rows": rows}))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def variants(layers: int) -> dict[str, list[str]]:
    """Name -> flags: dense, then each distance with projections kept and left out."""
    far, middle = round(0.75 * layers), round(0.4 * layers)
    distances = {str(far): [far], "1": [1], f"{far} {middle}": [far, middle]}
    return {"dense": []} | {
        f"{projection}, {name}": ["--sla", "--sla-kv-projection", projection, "--sla-skip-distance", *map(str, each)]
        for name, each in distances.items()
        for projection in ("full", "pruned")
    }


def methods() -> dict[str, list[str]]:
    """Name -> flags of what else may be shared, and of other sources."""
    return {
        f"{projection}, {name}": [*flags, "--sla-kv-projection", projection]
        for name, flags in METHODS.items()
        if name != "sla"
        for projection in ("full", "pruned")
    }


def counted(args: argparse.Namespace, device: str, layout: str, model: str) -> list[dict[str, Any]]:
    """One row for each variant of a model."""
    tensor, stages, chunks = LAYOUTS[layout]
    values = {"--seq-length": args.context, "--max-position-embeddings": args.context, "--train-iters": 1}
    values |= {"--micro-batch-size": 1, "--global-batch-size": 1 if stages == 1 else 2 * stages}
    values |= {"--tensor-model-parallel-size": tensor, "--pipeline-model-parallel-size": stages}
    values |= {"--core-attention": "sdpa", "--transformer-impl": "local"}
    if chunks > 1:
        values["--num-virtual-stages-per-pipeline-rank"] = chunks
    common = [*model_flags(model), *(["--bf16"] if device == "cuda" else [])]
    common += [str(word) for flag in values.items() for word in flag]
    layers, heads = (int(common[common.index(flag) + 1]) for flag in ("--num-layers", "--num-attention-heads"))
    if tensor > 1:
        # Half of the groups skip, so that each rank has as many live ones.
        grouped = "--num-query-groups" in common
        groups = int(common[common.index("--num-query-groups") + 1]) if grouped else heads
    rows: list[dict[str, Any]] = []
    asked = variants(layers) | (methods() if layout in args.methods else {})
    for name, flags in asked.items():
        if flags and tensor > 1:
            flags = [*flags, "--sla-num-skip-groups", str(groups // 2)]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                steps = TrainingSteps(settle([*common, *flags]))
        except FlagError as error:
            rows.append({"model": model, "layout": layout, "variant": name, "refused": error.reason})
            continue
        found = of_a_step(steps, pipeline=stages > 1)
        consumers = len(steps.sla.consumer_layers) if steps.sla else 0
        row = {"model": model, "layout": layout, "variant": name, "consumer_layers": consumers, **found}
        row["microbatches"] = steps.microbatches
        row["hidden_state_bytes"] = args.context * steps.args.hidden_size * steps.args.params_dtype.itemsize
        if rows:
            row |= beyond(row, rows[0])
        rows.append(row)
    return rows


def of_a_step(steps: TrainingSteps, pipeline: bool) -> dict[str, Any]:
    """Operations by name, their number, bytes written and kept, in a step."""
    import torch

    steps.step()  # It makes what later ones find.
    with operation_counter() as before:
        steps.step()
    with operation_counter() as counter, kept_by_autograd(steps) as kept, at_the_ends(counter) as ends:
        steps.step()
    if (before.operations, before.bytes_written) != (counter.operations, counter.bytes_written):
        raise RuntimeError(f"two steps differ: {before.operations} and {counter.operations}")
    found = {"by_name": dict(counter.operations), "bytes_written": counter.bytes_written, "bytes_kept": kept["bytes"]}
    found["at_the_ends"] = {end: max(ends.get(end, [0])) for end in ENDS}
    if pipeline:
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, found)
        names = sorted({name for each in of_ranks for name in each["by_name"]})
        found = {what: sum(each[what] for each in of_ranks) for what in ("bytes_written", "bytes_kept")}
        found["by_name"] = {name: sum(each["by_name"].get(name, 0) for each in of_ranks) for name in names}
        found["at_the_ends"] = {end: max(each["at_the_ends"][end] for each in of_ranks) for end in ENDS}
    return found | {"operations": sum(found["by_name"].values())}


@contextlib.contextmanager
def operation_counter() -> Iterator[Any]:
    """An ``OperationCounter`` that sees our own kernel too, which torch does not dispatch."""
    from sla_megatron.pipeline import copy_kernel

    from .counting import OperationCounter

    launch = copy_kernel.move

    def counting(targets: Any, sources: Any, copies: Any, sums: Any) -> bool:
        done = launch(targets, sources, copies, sums)
        if done:
            some = targets[copies[0].target]
            counter.operations["mixing kernel"] += 1
            counter.bytes_written += sum(run.count for run in copies) * some[:, :, 0].numel() * some.itemsize
        return done

    copy_kernel.move = counting
    try:
        with OperationCounter() as counter:
            yield counter
    finally:
        copy_kernel.move = launch


@contextlib.contextmanager
def at_the_ends(counter: Any) -> Iterator[dict[str, list[int]]]:
    """For each forward pass of a stage that K/V enter or leave, the operations of entering it, and of leaving it."""
    from sla_megatron.pipeline.step import PipelineStep

    found: dict[str, list[int]] = {}
    originals = {name: getattr(PipelineStep, name) for name in ENDS}

    def counting(name: str) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            before = counter.total
            result = originals[name](*args, **kwargs)
            found.setdefault(name, []).append(counter.total - before)
            return result

        return method

    for name in ENDS:
        setattr(PipelineStep, name, counting(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(PipelineStep, name, original)


@contextlib.contextmanager
def kept_by_autograd(steps: TrainingSteps) -> Iterator[dict[str, int]]:
    """``bytes`` of the storages that autograd saves within the block, each once, without the model's parameters."""
    import torch

    # Held: the memory of one that is gone would be another's.
    saved: dict[int, Any] = {}
    own = {p.untyped_storage().data_ptr() for chunk in steps.chunks for p in chunk.parameters()}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    found: dict[str, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found["bytes"] = sum(storage.nbytes() for storage in saved.values())


def beyond(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """What a consumer layer has more than a dense one in each microbatch, its source's side included."""
    layers = row["consumer_layers"] * row["microbatches"]
    hidden = layers * row["hidden_state_bytes"]
    return {
        "operations_beyond": (row["operations"] - dense["operations"]) / layers,
        "hidden_states_written_beyond": (row["bytes_written"] - dense["bytes_written"]) / hidden,
        "hidden_states_kept_beyond": (row["bytes_kept"] - dense["bytes_kept"]) / hidden,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """One of training steps, one of decoded tokens."""
    training = [row for row in result["rows"] if "layout" in row]
    cells = [
        (
            row["model"],
            row["layout"],
            row["variant"],
            str(row["operations"]) if "operations" in row else "refused",
            *(
                f"{row[f'{what}_beyond']:.2f}" if f"{what}_beyond" in row else ""
                for what in ("operations", "hidden_states_written", "hidden_states_kept")
            ),
            *(str(row.get("at_the_ends", {}).get(end) or "") for end in ENDS),
        )
        for row in training
    ]
    header = ("model", "layout", "variant, distance", "operations", "operations / consumer", "written", "kept", *ENDS)
    note = (
        "Of a step. Three columns are what a layer that reads an earlier one has beyond a dense layer, its "
        "source's side included, for each microbatch: operations, and hidden states (tokens x width) that are written "
        "and that autograd keeps for the backward pass. With tp2 half of the groups skip, elsewhere three quarters; "
        "refused are projections whose live groups the ranks cannot share. Enter and leave: the most operations with "
        "which a stage of a pipeline unpacks and fetches, and keeps and packs, in a forward pass."
    )
    found = [Table("Operations of a training step", header, cells, (0, 1, 2), note)]
    if decoding := [row for row in result["rows"] if "layout" not in row]:
        found.append(decoding_table(decoding))
    return found


def decoding_table(rows: list[dict[str, Any]]) -> Table:
    """Of rows of ``decoding_operations``."""
    cells = [
        (
            row["shape"],
            row["kind"],
            row.get("peer", row["variant"]),
            str(row["total"]),
            f"{row['operations_beyond_dense']:.2f}" if "operations_beyond_dense" in row else "",
            f"{row['bytes_written']:,}",
        )
        for row in rows
    ]
    header = ("model", "", "variant", "operations", "operations / consumer", "bytes written")
    note = (
        "Of the Hugging Face model, eager, with a dynamic cache; transformers' own model of the same shape beside it."
    )
    return Table("Operations of a decoded token", header, cells, (0, 1, 2), note)


if __name__ == "__main__":
    main()
