"""On each rank: build Megatron's encoders with skip-layer attention for each case, and compare them with a reference.

The models are those of ``encoder_models.py``.  Answers as ``parity_worker.py``'s, and who influences whom.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.support import parity_worker
from tests.support.encoder_models import MODELS


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One model against the reference; a number by a tensor's name is ``|found - expected| / |expected|``."""
    import torch
    from megatron.core import tensor_parallel

    from tests.support import sharding

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    kind = MODELS[case["model"]](case)
    model = build(kind, case)
    generator = torch.Generator().manual_seed(17)
    weights = sharding.random_weights(sharding.full_shapes(model), generator)
    kind.draw(generator)
    output, gradients = forward_backward(kind, model, weights)

    # The reference runs in double precision, so that all of the error is Megatron's fp32.
    exact = {name: tensor.cuda().double().requires_grad_() for name, tensor in weights.items()}
    expected = kind.expected(exact)
    kind.loss(expected).backward()
    answer = {"output": parity_worker.error(output[kind.has_meaning], expected[kind.has_meaning].detach())}
    answer |= {name: parity_worker.error(gradients[name], tensor.grad) for name, tensor in exact.items()}
    answer |= influences(kind, model)
    if case.get("like dense"):
        dense_output, dense_gradients = forward_backward(kind, build(kind, case, dense=True), weights)
        same = all(torch.equal(gradients[name], dense_gradients[name]) for name in weights)
        answer["is dense"] = torch.equal(output, dense_output) and same
    return answer


def forward_backward(kind: Any, model: Any, weights: Any) -> tuple[Any, dict[str, Any]]:
    """The output ``[b, s, ...]``, and by name the gradients of the loss."""
    from megatron.core.distributed import finalize_model_grads

    from tests.support import sharding

    sharding.load(model, weights)
    model.zero_grad_buffer()
    output = kind.output(model, kind.given)
    kind.loss(output.float()).backward()
    finalize_model_grads([model])
    return output.detach(), sharding.gather_gradients(model)


def influences(kind: Any, model: Any) -> dict[str, float]:
    """How far the output moves, where it has a meaning, when a bit of the first sequence or all padding is another."""
    import torch

    with torch.no_grad():
        before = kind.output(model, kind.given)
        by_bit, by_padding = (
            (kind.output(model, given) - before).abs().sum(-1) * kind.has_meaning
            for given in (kind.changed(), kind.other_padding())
        )
    return {
        "least in its sequence": float(by_bit[0].min()),
        "in other sequences": float(by_bit[1:].max()),
        "by padding": float(by_padding.max()),
    }


def build(kind: Any, case: dict[str, Any], dense: bool = False) -> Any:
    """Megatron's encoder wrapped in Megatron's DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from sla_megatron import sla_layer_spec, sla_transformer_blocks
    from sla_megatron.model.layer_specs import torch_attention_spec

    sla, config = parity_worker.sla_config(case, parity_worker.LAYERS), parity_worker.transformer_config(case)
    spec = torch_attention_spec(kind.spec) if case["core_attention"] == "sdpa" else kind.spec
    with nullcontext() if dense else sla_transformer_blocks(sla, kind.kind):
        model = kind.build(config, spec if dense else sla_layer_spec(spec, sla))
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=True, use_distributed_optimizer=False)
    return DistributedDataParallel(config=config, ddp_config=ddp_config, module=model.cuda().train())


if __name__ == "__main__":
    parity_worker.main(Path(sys.argv[1]), run_case)
