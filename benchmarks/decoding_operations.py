"""Operations and bytes of one decoded token: the Hugging Face model, dense and skip-layer, beside transformers' own.

Counted by :class:`benchmarks.counting.OperationCounter`: eager, with a dynamic cache that a prompt filled, batch 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .counting import OperationCounter
from .models import VARIANTS, hf_config, sla_config
from .peers import peer_model

#: Shape -> heads of keys and values; narrow, as the count depends on no width.
SHAPES = {"narrow": "MHA, learned", "narrow-llama": "GQA, rope"}


def decoding_rows(prompt: int = 16) -> list[dict[str, Any]]:
    """One row for each shape and model: dense, ``full``, ``pruned`` and ``peer``.

    Args:
        prompt: tokens in the cache before the one that is counted.

    Returns:
        rows with the fields ``shape``, ``kind``, ``variant``, ``peer`` (the class, of a peer), ``operations`` by name,
        ``total``, ``bytes_written``, and of the skip-layer variants ``operations_beyond_dense`` and
        ``bytes_beyond_dense``, for each consumer layer.
    """
    rows = []
    for shape, kind in SHAPES.items():
        models = dict(_models(shape, prompt + 2))
        found = {variant: count_token(model, prompt) for variant, model in models.items()}
        dense = found["dense"]
        consumers = len(sla_config(shape).consumer_layers)
        for variant, counter in found.items():
            row = {
                **{"shape": shape, "kind": kind, "variant": variant, "operations": dict(counter.operations)},
                **{"total": counter.total, "bytes_written": counter.bytes_written},
            }
            if variant in VARIANTS[1:]:
                row["operations_beyond_dense"] = (counter.total - dense.total) / consumers
                row["bytes_beyond_dense"] = (counter.bytes_written - dense.bytes_written) / consumers
            if variant == "peer":
                row["peer"] = type(models[variant]).__name__
            rows.append(row)
    return rows


def _models(shape: str, positions: int) -> Iterator[tuple[str, Any]]:
    from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

    for variant in VARIANTS:
        yield variant, SlaGPTForCausalLM(hf_config(shape, variant, positions)).eval()
    yield "peer", peer_model(shape, positions).eval()


@torch.no_grad()
def count_token(model: Any, prompt: int) -> OperationCounter:
    """What ``model`` does for one token behind ``prompt`` ones and one more that was decoded before."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for tokens in (torch.zeros(1, prompt, dtype=torch.long), last := torch.zeros(1, 1, dtype=torch.long)):
        model(tokens, past_key_values=cache, use_cache=True)
    with OperationCounter() as counter:
        model(last, past_key_values=cache, use_cache=True)
    return counter
