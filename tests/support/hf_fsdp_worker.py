"""One rank of accelerate's FSDP2: the gradients of an SLA model, each of them gathered, into a file by rank 0."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

from tests.unit.hf.hf_models import build, tiny, tokens

#: A model has two distances; ``pruned`` ones and those whose every group skips have fewer keys and values.
MODELS = {
    "full": {},
    "pruned, all groups skip": {"sla_kv_projection": "pruned", "sla_skip_groups": [0, 1, 2, 3]},
    "recomputed": {},
    "values of one layer": {"sla_share": "values", "sla_skip_distances": [], "sla_source_layers": [2]},
}


def main(out: Path) -> None:
    found = {}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["SlaGPTDecoderLayer"],
        reshard_after_forward=True,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for name, changes in MODELS.items():
        model = build(tiny(**changes)).train()
        if name == "recomputed":
            model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # It takes FSDP for GPUs alone, and would go on with DDP on each look at its state.
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        model, optimizer = accelerator.prepare(model, optimizer)
        # A row for each rank: together, the batch of the model that is whole.
        batch = tokens()[accelerator.process_index][None]
        accelerator.backward(F.cross_entropy(model(batch).logits.flatten(0, 1), batch.flatten()))
        found[name] = {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}
        # A plain tensor, or one that each rank has whole, would be no FSDP.
        assert all(p.to_local().shape != p.shape or p.shape[0] == 1 for p in model.parameters())
    if accelerator.is_main_process:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
