"""On each rank: build Megatron's BERT with skip-layer attention for each case, and compare it with the reference.

The reference is ``tests/reference_encoder.py``.  Answers as ``parity_worker.py``'s, and who influences whom.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.support import parity_worker

VOCABULARY, SEQUENCE, HIDDEN, HEAD_SIZE = 32, 12, 32, 8
LAYERS, HEADS = 4, 4
#: Tokens of each sequence of the batch; the rest is padding.
LENGTHS = (12, 8, 1)
#: Changing this token must change every logit of its sequence, and no other.
CHANGED_TOKEN = 5


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One model against the reference; a number by a tensor's name is ``|found - expected| / |expected|``."""
    import torch
    import torch.nn.functional as F
    from megatron.core import tensor_parallel

    from tests.support import sharding

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    reference, model = build(case)
    generator = torch.Generator().manual_seed(17)
    weights = sharding.random_weights(sharding.full_shapes(model), generator)
    shape = (len(LENGTHS), SEQUENCE)
    tokens, labels = (torch.randint(VOCABULARY, shape, generator=generator).cuda() for _ in range(2))
    is_token = torch.arange(SEQUENCE).cuda() < torch.tensor(LENGTHS).cuda()[:, None]
    logits, gradients = forward_backward(model, weights, tokens, labels, is_token)

    # The reference runs in double precision, so that all of the error is Megatron's fp32.
    exact = {name: tensor.cuda().double().requires_grad_() for name, tensor in weights.items()}
    expected = reference.logits(exact, tokens, is_token)
    F.cross_entropy(expected[is_token], labels[is_token]).backward()
    answer = {"logits": parity_worker.error(logits[is_token], expected[is_token].detach())}
    answer |= {name: parity_worker.error(gradients[name], tensor.grad) for name, tensor in exact.items()}
    answer |= influences(model, tokens, is_token)
    if case.get("like dense"):
        dense_logits, dense_gradients = forward_backward(build(case, dense=True)[1], weights, tokens, labels, is_token)
        same = all(torch.equal(gradients[name], dense_gradients[name]) for name in weights)
        answer["is dense"] = torch.equal(logits, dense_logits) and same
    return answer


def forward_backward(model: Any, weights: Any, tokens: Any, labels: Any, is_token: Any) -> tuple[Any, dict[str, Any]]:
    """Logits ``[b, s, vocabulary]``, and by name the gradients of the mean cross entropy over what is not padding."""
    import torch.nn.functional as F
    from megatron.core.distributed import finalize_model_grads

    from tests.support import sharding

    sharding.load(model, weights)
    model.zero_grad_buffer()
    logits = whole_logits(model, tokens, is_token)
    F.cross_entropy(logits[is_token].float(), labels[is_token]).backward()
    finalize_model_grads([model])
    return logits.detach(), sharding.gather_gradients(model)


def whole_logits(model: Any, tokens: Any, is_token: Any) -> Any:
    from megatron.core import tensor_parallel

    logits, _ = model(tokens, is_token.float())
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits)


def influences(model: Any, tokens: Any, is_token: Any) -> dict[str, float]:
    """How far logits move, at tokens, when one token or when all padding is another."""
    import torch

    def moved(is_changed: Any) -> Any:
        """``[b, s]``, zero at padding."""
        changed = torch.where(is_changed, (tokens + 1) % VOCABULARY, tokens)
        difference = whole_logits(model, changed, is_token) - whole_logits(model, tokens, is_token)
        return difference.abs().sum(-1) * is_token

    one = torch.zeros_like(is_token)
    one[0, CHANGED_TOKEN] = True
    with torch.no_grad():
        by_token, by_padding = moved(one), moved(~is_token)
    return {
        "least before the change": float(by_token[0, :CHANGED_TOKEN].min()),
        "least after the change": float(by_token[0, CHANGED_TOKEN:].min()),
        "in other sequences": float(by_token[1:].max()),
        "by padding": float(by_padding.max()),
    }


def build(case: dict[str, Any], dense: bool = False) -> tuple[Any, Any]:
    """The reference, and Megatron's encoder wrapped in Megatron's DDP."""
    from contextlib import nullcontext

    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    from sla_megatron import SLAConfig, sla_layer_spec, sla_transformer_blocks
    from sla_megatron.model.layer_specs import torch_attention_spec
    from tests.reference_encoder import ReferenceEncoder

    distances, skip_groups, pruned = case["distances"], case["skip_groups"], case["projection"] == "pruned"
    sla = SLAConfig(LAYERS, case["groups"], tuple(distances), skip_groups, kv_projection=case["projection"])
    spec = torch_attention_spec(bert_layer_local_spec) if case["core"] == "sdpa" else bert_layer_local_spec
    config = parity_worker.transformer_config(case)
    with nullcontext() if dense else sla_transformer_blocks(sla, BertModel):
        model = BertModel(
            config=config,
            num_tokentypes=0,
            transformer_layer_spec=spec if dense else sla_layer_spec(spec, sla),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            share_embeddings_and_output_weights=case["tied"],
            position_embedding_type="rope" if case["rope"] else "learned_absolute",
            add_binary_head=False,
        )
    reference = ReferenceEncoder(
        num_layers=LAYERS,
        num_heads=HEADS,
        num_groups=case["groups"],
        head_size=HEAD_SIZE,
        distances=tuple(distances),
        num_skip_groups=skip_groups,
        pruned=pruned,
        rope=case["rope"],
    )
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=True, use_distributed_optimizer=False)
    return reference, DistributedDataParallel(config=config, ddp_config=ddp_config, module=model.cuda().train())


if __name__ == "__main__":
    parity_worker.main(Path(sys.argv[1]), run_case)
