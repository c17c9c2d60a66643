"""Full recomputation with what crosses layers as explicit inputs and outputs of each checkpoint.

Upstream's re-runs a chunk of layers during backward, through reentrant checkpointing: only tensors that are *arguments*
of the checkpointed function get gradients.  A tensor that reached a chunk by any other way would yield the right loss
with wrong gradients, silently.  So each chunk here takes the tensors that its layers read as arguments, and returns the
ones that are used outside of it.

In fp8 and fp4 each layer runs in the context that upstream opens for it, in the forward pass and when it is recomputed;
the checkpoint is then Transformer Engine's, which finds a layer's scales again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core import recompute, tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from ..pipeline.declarations import Name
from ..pipeline.joining import joined
from ..pipeline.waiting import current, microbatch
from ..upstream.seams import OneOf, Reliance, Seam

#: What upstream's function keeps from a layer that is no ``TransformerLayer``.
_OF_TRANSFORMER_LAYERS = ("context", "context_mask", "attention_bias", "padding_mask", "input_ids")


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
    """Stands for ``megatron.core.recompute.checkpointed_forward`` while an SLA block's forward runs, of either kind.

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

    of_other_layers = {name: value for name, value in layer_arguments.items() if name not in _OF_TRANSFORMER_LAYERS}

    def run(layers: Sequence[Any], hidden_states: Tensor) -> Tensor:
        for layer in layers:
            # Of a hybrid model's layers Mamba's is none: it takes less, and returns a tensor.
            is_transformer = isinstance(layer, TransformerLayer)
            arguments = layer_arguments if is_transformer else of_other_layers
            with _quantization(layer) if use_inner_quantization_context else nullcontext():
                result = layer(hidden_states=hidden_states, **arguments)
            hidden_states = result[0] if isinstance(result, tuple) else result
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


def _chunks(block: MegatronModule) -> tuple[list[Sequence[Any]], int]:
    """The block's layers as upstream groups them, and how many of the groups are recomputed."""
    layers, size = list(block.layers), block.config.recompute_num_layers
    if block.config.recompute_method == "uniform":
        chunks = [layers[start : start + size] for start in range(0, len(layers), size)]
        return chunks, len(chunks)
    if block.config.recompute_method == "block":
        return [[layer] for layer in layers], size
    raise ValueError(f"--recompute-method {block.config.recompute_method}: expected uniform or block")


def _is_quantized(block: MegatronModule) -> bool:
    return bool(block.config.fp8 or block.config.fp4)


def _quantization(layer: Any) -> AbstractContextManager:
    """What upstream opens for ``layer`` where the recipe has a context for each layer."""
    opens = recompute.get_fp8_context if layer.config.fp8 else recompute.get_fp4_context
    return opens(layer.config, layer.layer_number - 1)


def _recomputed_chunk(
    block: MegatronModule,
    layers: Sequence[Any],
    run: Callable[[Sequence[Any], Tensor], Tensor],
    hidden_states: Tensor,
) -> Tensor:
    """One checkpoint: hidden states and the tensors it reads go in, hidden states and the tensors it leaves, out."""
    reads, leaves = _crossing(block, layers)
    inside = block.declared.reads_within([layer.layer_number for layer in layers])
    held = current()

    def chunk(hidden_states: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # What leaves is taken once more, below.
        with microbatch(inside + Counter(leaves)) as inner:
            for name, tensor in zip(reads, tensors, strict=True):
                inner.put(name, (tensor,))
            hidden_states = run(layers, hidden_states)
            return (hidden_states, *joined([inner.take(name) for name in leaves]))

    read = joined([held.take(name, inside[name]) for name in reads])
    hidden_states, *left = _checkpoint(block, chunk, hidden_states, *read)
    for name, tensor in zip(leaves, left, strict=True):
        held.put(name, (tensor,), block.uses[name] - inside[name])
    return hidden_states


def _checkpoint(block: MegatronModule, function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, recomputed in backward: by the checkpoint that upstream would use."""
    distributes = block.config.distribute_saved_activations
    if _is_quantized(block):
        tracker = tensor_parallel.random.get_cuda_rng_tracker
        return recompute.te_checkpoint(function, distributes, tracker, block.pg_collection.tp, *tensors)
    return tensor_parallel.checkpoint(function, distributes, *tensors)


def _crossing(block: Any, layers: Sequence[Any]) -> tuple[list[Name], list[Name]]:
    """The tensors that ``layers`` read from outside, and those of theirs that are used outside."""
    numbers = {layer.layer_number for layer in layers}
    inside = block.declared.reads_within(numbers)
    reads = [one.name for one in block.declared.tensors if inside[one.name] and one.source not in numbers]
    made = [one.name for layer in layers for one in block.declared.made_by(layer.layer_number)]
    return reads, [name for name in made if block.uses[name] > inside[name]]


_REASON = "full recomputation must carry what crosses layers in and out of each checkpoint"

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

_READ_IN = {"163861b4ad4fa9d4": "0.19.0 to 0.19.2, and main at d98e8a64"}


def _function_in(module: str, *further: str, sources: Mapping[str, str] | None = None) -> Seam:
    """The seam of the block in ``module``, which names upstream's function there, with ``further`` parameters."""
    return Seam(
        f"{module}:checkpointed_forward",
        f"{_REASON}; only while such a block runs",
        (*_PARAMETERS, *further),
        sources=sources or _READ_IN,
        stand_in=checkpointed_forward,
    )


#: A function since upstream's #4496; in dev, which has that change for hybrid models alone, a method of this block.
CHECKPOINTED_FORWARD = OneOf(
    _function_in("megatron.core.transformer.transformer_block"),
    Reliance(
        "megatron.core.transformer.transformer_block:TransformerBlock._checkpointed_forward",
        f"overridden by CrossLayerTransformerBlock: {_REASON}",
        (*_PARAMETERS, "input_ids"),
        sources={"e46be4066ebe8bac": "dev at d48bd6be"},
    ),
)
HYBRID_CHECKPOINTED_FORWARD = OneOf(
    _function_in("megatron.core.models.hybrid.hybrid_block"),
    _function_in(
        "megatron.core.models.hybrid.hybrid_block", "input_ids", sources={"6efc429ff111527d": "dev at d48bd6be"}
    ),
)
