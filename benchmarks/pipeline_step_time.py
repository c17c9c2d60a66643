"""Step time of a pipeline, skip-layer against dense, and the host synchronisations that K/V transport adds.

    torchrun --nproc-per-node 2 benchmarks/pipeline_step_time.py --json pipeline_step_time.json

Every rank is a pipeline rank.  Both models live in the same processes and take turns, step by step, so that the
machine's drift cancels; the first step of each is left out.  Reported: the ratio of the median step times, each one's
spread, bytes that a step hands to isend over all ranks, and calls of what makes the host wait for a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sla_megatron.device import add_device_arg, megatron_device

#: What makes the host wait for a GPU.
SYNCHRONISATIONS = (
    "torch.cuda:synchronize",
    "torch.cuda:Event.synchronize",
    "torch.cuda:Stream.synchronize",
    "torch:Tensor.item",
    "torch:Tensor.tolist",
    "torch:Tensor.cpu",
)

VOCABULARY = 512


def main() -> None:
    """Parse the flags, run both layouts, print a table on rank 0 and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("hidden", 256), ("heads", 8), ("seq-length", 256), ("microbatches", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each model (default: 10)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = add_device_arg(parser).parse_args()
    with megatron_device() as device:
        rows = [measure(args, device, chunks) for chunks in (1, 2)]
    if os.environ.get("RANK", "0") == "0":
        report(rows, args)


def measure(args: argparse.Namespace, device: str, chunks: int) -> dict[str, Any]:
    """One layout: ``P`` ranks with ``chunks`` virtual stages each."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    if not torch.distributed.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=size, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    distance = round(0.75 * args.layers)
    models = {name: build(args, device, size, chunks, n) for name, n in (("dense", None), ("sla", distance))}
    run = get_forward_backward_func()
    times: dict[str, list[float]] = {name: [] for name in models}
    counts: dict[str, Counter[str]] = {}
    for step in range(args.steps + 1):
        for name, model in models.items():
            torch.distributed.barrier()
            with counted(torch) as counts[name]:
                start = time.perf_counter()
                train_step(run, model, args)
                if device == "cuda":
                    torch.cuda.synchronize()
                torch.distributed.barrier()
            if step:
                times[name].append(time.perf_counter() - start)
    parallel_state.destroy_model_parallel()
    return {
        "layout": f"PP={size}" + (f" x VPP={chunks}" if chunks > 1 else ""),
        "distance": distance,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "num_steps": args.steps,
        "ratio": statistics.median(times["sla"]) / statistics.median(times["dense"]),
        "seconds": {name: spread(values) for name, values in times.items()},
        "sent_bytes": {name: summed(torch, count["sent bytes"]) for name, count in counts.items()},
        "synchronisations": {
            name: summed(torch, sum(count[each] for each in SYNCHRONISATIONS)) for name, count in counts.items()
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, fastest and slowest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summed(torch: Any, value: int) -> int:
    """``value`` over all ranks."""
    total = torch.tensor([value], dtype=torch.long, device="cuda")
    torch.distributed.all_reduce(total)
    return int(total.item())


def build(args: argparse.Namespace, device: str, size: int, chunks: int, distance: int | None) -> list[Any]:
    """This rank's model chunks, skip-layer with ``distance`` or dense."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from sla_megatron.config import SLAConfig, default_num_skip_groups
    from sla_megatron.cpu.flags import CONFIG_ON_CPU
    from sla_megatron.model import SLAGPTModelBuilder, SLAGPTModelConfig

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    transformer = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        ffn_hidden_size=4 * args.hidden,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_model_parallel_size=size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        # As Megatron's trainer chooses them.
        pipeline_dtype=dtype,
        deallocate_pipeline_outputs=True,
        overlap_p2p_comm=chunks > 1,
        batch_p2p_comm=chunks == 1,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        **CONFIG_ON_CPU,
    )
    shape = {"transformer": transformer, "vocab_size": VOCABULARY, "seq_length": args.seq_length}
    if distance is None:
        builder: Any = GPTModelBuilder(GPTModelConfig(**shape, position_embedding_type="rope"))
    else:
        sla = SLAConfig(args.layers, args.heads, (distance,), default_num_skip_groups(args.heads))
        builder = SLAGPTModelBuilder(SLAGPTModelConfig(**shape, position_embedding_type="rope", sla=sla))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stages = range(chunks) if chunks > 1 else [None]
    return [builder.build_model(groups, vp_stage=stage).cuda().to(dtype) for stage in stages]


def train_step(run: Callable[..., Any], model: list[Any], args: argparse.Namespace) -> None:
    """Forward and backward passes of ``--microbatches`` microbatches of one random sequence each; gradients dropped."""
    import torch

    tokens = torch.randint(VOCABULARY, (1, args.seq_length + 1), device="cuda")
    positions = torch.arange(args.seq_length, device="cuda").expand(1, -1)

    def forward_step(_: Iterator[Any], chunk: Any) -> tuple[Any, Callable[..., Any]]:
        losses = chunk(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        return losses, lambda output: (output.float().mean(), {})

    run(
        forward_step_func=forward_step,
        data_iterator=[None] * len(model) if len(model) > 1 else None,
        model=model,
        num_microbatches=args.microbatches,
        seq_length=args.seq_length,
        micro_batch_size=1,
        forward_only=False,
    )
    for chunk in model:
        chunk.zero_grad(set_to_none=True)


@contextmanager
def counted(torch: Any) -> Iterator[Counter[str]]:
    """Within the block, calls of :data:`SYNCHRONISATIONS` and bytes handed to isend are counted."""
    from megatron.core.pipeline_parallel import p2p_communication

    counts: Counter[str] = Counter()
    originals = []

    def wrap(owner: Any, name: str, note: Callable[[dict[str, Any]], None]) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            note(kwargs)
            return original(*args, **kwargs)

        originals.append((owner, name, original))
        setattr(owner, name, wrapper)

    def note_sent(tensors: dict[str, Any]) -> None:
        for tensor in (tensors["tensor_send_next"], tensors["tensor_send_prev"]):
            counts["sent bytes"] += 0 if tensor is None else tensor.numel() * tensor.element_size()

    for target in SYNCHRONISATIONS:
        owner: Any = torch.cuda if target.startswith("torch.cuda") else torch
        *path, name = target.partition(":")[2].split(".")
        for part in path:
            owner = getattr(owner, part)
        wrap(owner, name, lambda _, target=target: counts.update([target]))
    for name in ("_p2p_ops", "_batched_p2p_ops"):
        wrap(p2p_communication, name, note_sent)
    try:
        yield counts
    finally:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The table, and the JSON file under its final name once it is whole."""
    for row in rows:
        seconds, sent, waits = row["seconds"], row["sent_bytes"], row["synchronisations"]
        print(
            f"{row['layout']}, {args.layers} layers, distance {row['distance']}, {row['num_steps']} steps each, "
            f"{row['device']}, torch {row['torch']}:"
        )
        for name in ("dense", "sla"):
            figures = seconds[name]
            print(
                f"  {name:5}  {figures['median']:.4f} s a step ({figures['min']:.4f} to {figures['max']:.4f}), "
                f"{sent[name]} bytes sent, {waits[name]} host synchronisations"
            )
        print(f"  SLA/dense: {row['ratio']:.3f} in time, {sent['sla'] / sent['dense']:.3f} in bytes")
        print(f"  host synchronisations added: {waits['sla'] - waits['dense']}", flush=True)
    if args.json is not None:
        unfinished = args.json.with_name(args.json.name + ".tmp")
        unfinished.write_text(json.dumps({"flags": vars(args), "rows": rows}, default=str, indent=1) + "\n")
        unfinished.rename(args.json)


if __name__ == "__main__":
    main()
