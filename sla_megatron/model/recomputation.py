"""Full recomputation with K/V as explicit inputs and outputs of each checkpoint.

Upstream's re-runs a chunk of layers during backward, through reentrant checkpointing: only tensors that are *arguments*
of the checkpointed function get gradients.  K/V that reached a chunk by any other way would yield the right loss with
wrong gradients, silently.  So each chunk here takes the bundles that its layers read as arguments, and returns the ones
that later layers read.

In fp8 and fp4 each layer runs in the context that upstream opens for it, in the forward pass and when it is recomputed;
the checkpoint is then Transformer Engine's, which finds a layer's scales again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core import recompute, tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from ..attention.microbatch_kv import Bundle, MicrobatchKV, current, microbatch
from ..attention.roles import BundleName
from ..attention.self_attention import SLASelfAttention
from ..upstream.seams import OneOf, Reliance, Seam


def checkpointed_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    context: Tensor | None,
    context_mask: Tensor | None,
    rotary_pos_emb: Any,
    attention_bias: Tensor | None,
    packed_seq_params: Any,
    use_inner_quantization_context: bool,
    padding_mask: Tensor | None = None,
    extract_layer_indices: set[int] | None = None,
    layer_offset: int = 0,
    input_ids: Tensor | None = None,
) -> Tensor:
    """Stands for ``megatron.core.recompute.checkpointed_forward`` while an SLA block's forward runs.

    ``hidden_states`` is ``[s, b, h]``.  The chunks are upstream's (``--recompute-method``, ``--recompute-num-layers``).
    ``input_ids`` come from dev alone, whose layers take them.
    """
    if extract_layer_indices:
        raise RuntimeError("full recomputation with --sla does not support the extraction of hidden states")
    layer_arguments = dict(
        attention_mask=attention_mask,
        context=context,
        context_mask=context_mask,
        rotary_pos_emb=rotary_pos_emb,
        attention_bias=attention_bias,
        inference_context=None,
        packed_seq_params=packed_seq_params,
        padding_mask=padding_mask,
    )
    if input_ids is not None:
        layer_arguments["input_ids"] = input_ids

    def run(layers: Sequence[Any], hidden_states: Tensor) -> Tensor:
        for layer in layers:
            with _quantization(layer) if use_inner_quantization_context else nullcontext():
                hidden_states, _ = layer(hidden_states=hidden_states, **layer_arguments)
        return hidden_states

    chunks, left = _chunks(self)
    for layers in chunks:
        # Transformer Engine's checkpoint needs an input with a gradient: upstream turns to later layers instead.
        too_early = _is_quantized(self) and self.config.recompute_method == "block" and not hidden_states.requires_grad
        if left and not too_early:
            left -= 1
            hidden_states = _recomputed_chunk(self, layers, run, hidden_states)
        else:
            hidden_states = run(layers, hidden_states)
    return hidden_states


def _chunks(block: TransformerBlock) -> tuple[list[Sequence[Any]], int]:
    """The block's layers as upstream groups them, and how many of the groups are recomputed."""
    layers, size = list(block.layers), block.config.recompute_num_layers
    if block.config.recompute_method == "uniform":
        chunks = [layers[start : start + size] for start in range(0, len(layers), size)]
        return chunks, len(chunks)
    if block.config.recompute_method == "block":
        return [[layer] for layer in layers], size
    raise ValueError(f"--recompute-method {block.config.recompute_method}: expected uniform or block")


def _is_quantized(block: TransformerBlock) -> bool:
    return bool(block.config.fp8 or block.config.fp4)


def _quantization(layer: Any) -> AbstractContextManager:
    """What upstream opens for ``layer`` where the recipe has a context for each layer."""
    opens = recompute.get_fp8_context if layer.config.fp8 else recompute.get_fp4_context
    return opens(layer.config, layer.layer_number - 1)


def _recomputed_chunk(
    block: TransformerBlock,
    layers: Sequence[Any],
    run: Callable[[Sequence[Any], Tensor], Tensor],
    hidden_states: Tensor,
) -> Tensor:
    """One checkpoint: hidden states and the bundles it reads go in, hidden states and the bundles it leaves, out."""
    reads, leaves = _crossing(layers)
    kv = current()

    def chunk(hidden_states: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with microbatch() as inner:
            put_tensors(inner, reads, tensors)
            hidden_states = run(layers, hidden_states)
            return (hidden_states, *take_tensors(inner, leaves))

    hidden_states, *left = _checkpoint(block, chunk, hidden_states, *take_tensors(kv, reads))
    put_tensors(kv, leaves, left)
    return hidden_states


def _checkpoint(block: TransformerBlock, function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, recomputed in backward: by the checkpoint that upstream would use."""
    distributes = block.config.distribute_saved_activations
    if _is_quantized(block):
        tracker = tensor_parallel.random.get_cuda_rng_tracker
        return recompute.te_checkpoint(function, distributes, tracker, block.pg_collection.tp, *tensors)
    return tensor_parallel.checkpoint(function, distributes, *tensors)


def take_tensors(kv: MicrobatchKV, names: Sequence[BundleName]) -> list[Tensor]:
    """The bundles ``names`` of ``kv`` as tensors ``[s, b, groups, d]``, key and value in turn."""
    return [tensor for name in names for tensor in kv.take(name).joined()]


def put_tensors(kv: MicrobatchKV, names: Sequence[BundleName], tensors: Sequence[Tensor]) -> None:
    """The reverse of :func:`take_tensors`."""
    for name, key, value in zip(names, tensors[0::2], tensors[1::2], strict=True):
        kv.put(name, Bundle([key], [value]))


def _crossing(layers: Sequence[Any]) -> tuple[list[BundleName], list[BundleName]]:
    """The bundles that ``layers`` read from outside, and those that they leave to layers outside."""
    attentions = [layer.self_attention for layer in layers if isinstance(layer.self_attention, SLASelfAttention)]
    puts = [name for attention in attentions for name in attention.role.puts]
    takes = [name for attention in attentions for name in attention.role.takes]
    return [name for name in takes if name not in puts], [name for name in puts if name not in takes]


_REASON = "full recomputation must carry shared K/V as inputs and outputs of each checkpoint"

_PARAMETERS = (
    "self",
    "hidden_states",
    "attention_mask",
    "context",
    "context_mask",
    "rotary_pos_emb",
    "attention_bias",
    "packed_seq_params",
    "use_inner_quantization_context",
    "padding_mask",
    "extract_layer_indices",
    "layer_offset",
)

#: A function since upstream's #4496; in dev, which has that change for other blocks, a method of this one.
CHECKPOINTED_FORWARD = OneOf(
    Seam(
        "megatron.core.transformer.transformer_block:checkpointed_forward",
        f"{_REASON}; only while an SLA block runs",
        _PARAMETERS,
        sources={"163861b4ad4fa9d4": "0.19.0 to 0.19.2, and main at d98e8a64"},
        stand_in=checkpointed_forward,
    ),
    Reliance(
        "megatron.core.transformer.transformer_block:TransformerBlock._checkpointed_forward",
        f"overridden by CrossLayerTransformerBlock: {_REASON}",
        (*_PARAMETERS, "input_ids"),
        sources={"e46be4066ebe8bac": "dev at d48bd6be"},
    ),
)
