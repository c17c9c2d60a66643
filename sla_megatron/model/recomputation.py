"""Full recomputation with K/V as explicit inputs and outputs of each checkpoint.

Upstream's re-runs a chunk of layers during backward, through reentrant checkpointing: only tensors that are *arguments*
of the checkpointed function get gradients.  K/V that reached a chunk by any other way would yield the right loss with
wrong gradients, silently.  So each chunk here takes the bundles that its layers read as arguments, and returns the ones
that later layers read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from ..attention.microbatch_kv import Bundle, MicrobatchKV, current, microbatch
from ..attention.roles import BundleName
from ..attention.self_attention import SLASelfAttention
from ..upstream.seams import Seam


def _checkpointed_forward(
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
) -> Tensor:
    """Stands for ``megatron.core.recompute.checkpointed_forward`` while an SLA block's forward runs.

    ``hidden_states`` is ``[s, b, h]``.  The chunks are upstream's (``--recompute-method``, ``--recompute-num-layers``).
    """
    if use_inner_quantization_context or extract_layer_indices:
        raise RuntimeError("full recomputation with --sla supports neither fp8/fp4 nor the extraction of hidden states")
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
    for layers, is_recomputed in _chunks(self):
        if is_recomputed:
            hidden_states = _recomputed_chunk(
                layers, layer_arguments, self.config.distribute_saved_activations, hidden_states
            )
        else:
            hidden_states = _run(layers, layer_arguments, hidden_states)
    return hidden_states


def _chunks(block: TransformerBlock) -> Iterator[tuple[Sequence[Any], bool]]:
    """The block's layers as upstream groups them, and whether each group is recomputed."""
    layers, size = list(block.layers), block.config.recompute_num_layers
    if block.config.recompute_method == "uniform":
        for start in range(0, len(layers), size):
            yield layers[start : start + size], True
    elif block.config.recompute_method == "block":
        for index, layer in enumerate(layers):
            yield [layer], index < size
    else:
        raise ValueError(f"--recompute-method {block.config.recompute_method}: expected uniform or block")


def _run(layers: Sequence[Any], layer_arguments: dict[str, Any], hidden_states: Tensor) -> Tensor:
    for layer in layers:
        hidden_states, _ = layer(hidden_states=hidden_states, **layer_arguments)
    return hidden_states


def _recomputed_chunk(
    layers: Sequence[Any], layer_arguments: dict[str, Any], distribute_saved_activations: bool, hidden_states: Tensor
) -> Tensor:
    """One checkpoint: hidden states and the bundles it reads go in, hidden states and the bundles it leaves, out."""
    reads, leaves = _crossing(layers)
    kv = current()

    def chunk(hidden_states: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with microbatch() as inner:
            put_tensors(inner, reads, tensors)
            hidden_states = _run(layers, layer_arguments, hidden_states)
            return (hidden_states, *take_tensors(inner, leaves))

    hidden_states, *left = tensor_parallel.checkpoint(
        chunk, distribute_saved_activations, hidden_states, *take_tensors(kv, reads)
    )
    put_tensors(kv, leaves, left)
    return hidden_states


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


CHECKPOINTED_FORWARD = Seam(
    "megatron.core.transformer.transformer_block:checkpointed_forward",
    "full recomputation must carry shared K/V as inputs and outputs of each checkpoint; only while an SLA block runs",
    (
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
    ),
    sources={"163861b4ad4fa9d4": "0.19.0 to 0.19.2, and main at d98e8a64"},
    stand_in=_checkpointed_forward,
)
