"""The stack of a hybrid model's layers, one kind each, whose attention layers share K/V.

Megatron builds it from a spec, ``HybridModel(config, hybrid_stack_spec, ...)``: :func:`sla_hybrid_stack_spec` makes one
that says :class:`SLAHybridStack`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size
from torch import Tensor

from ..attention.declared import declare
from ..attention.numbering import LayerNumbers
from ..attention.sla_config import SLAConfig
from ..pipeline.declarations import Declarations
from ..pipeline.megatron_layout import hybrid_layout
from ..upstream.seams import Reliance
from .crossing import CrossLayerBlock
from .layer_specs import sla_layer_spec, torch_attention_spec
from .recomputation import HYBRID_CHECKPOINTED_FORWARD

#: Called with whatever they are given, so that no signature is assumed.
OVERRIDDEN = (
    Reliance(
        "megatron.core.models.hybrid.hybrid_block:HybridStack.__init__",
        "overridden by SLAHybridStack, to build SLA layers, and a last norm that needs no Transformer Engine",
    ),
    Reliance(
        "megatron.core.models.hybrid.hybrid_block:HybridStack.forward",
        "overridden by CrossLayerBlock, to open a microbatch, and to return no stage's input as its output",
    ),
)


class NormedHybridStack(HybridStack):
    """Upstream's ``HybridStack``, whose last norm is not Transformer Engine's where ``final_norm`` builds another.

    The other arguments are upstream's, by name.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        post_layer_norm: bool = True,
        final_norm: LayerNormBuilder | None = None,
        **kwargs: Any,
    ) -> None:
        # Upstream's constructor names its norm, of which there is none without Transformer Engine.
        super().__init__(config, post_layer_norm=post_layer_norm and final_norm is None, **kwargs)
        self.post_layer_norm = post_layer_norm
        if final_norm is not None and self.post_process and post_layer_norm:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As upstream; a stage without layers returns a copy of its input, as a ``TransformerBlock`` does."""
        hidden_states = super().forward(*args, **kwargs)
        # A schedule empties the output of a stage once it is sent, and the input with it.
        return hidden_states.clone() if hidden_states is self.input_tensor else hidden_states


class CrossLayerHybridStack(CrossLayerBlock, NormedHybridStack):
    """Upstream's ``HybridStack``, whose layers share whatever tensors are declared.

    Args:
        declared: the tensors that its layers hand over and receive; they name layers by their numbers in the stack.
        pattern: the whole model's ``--hybrid-layer-pattern``.
        vp_stage: which model chunk of its rank this is; the other arguments are upstream's, by name.
    """

    checkpoint_seams = (HYBRID_CHECKPOINTED_FORWARD,)

    def __init__(
        self,
        config: TransformerConfig,
        *,
        declared: Declarations,
        pattern: str,
        vp_stage: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, **kwargs)
        ends = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
        layout = partial(hybrid_layout, pattern, config.pipeline_model_parallel_size, *ends)
        self.join_pipeline(declared, layout, vp_stage or 0)


class SLAHybridStack(CrossLayerHybridStack):
    """Upstream's ``HybridStack``, whose forward is one microbatch of K/V shared among its attention layers.

    Args:
        submodules: upstream's, with upstream's self-attention, which is replaced (``layer_specs.py``).
        sla: the model's skip-layer attention; its layers are the attention layers.
        pattern: the whole model's ``--hybrid-layer-pattern``.
        pg_collection: upstream's, as the other arguments, by name.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        submodules: HybridStackSubmodules,
        sla: SLAConfig,
        pattern: str,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        numbers = LayerNumbers.of_pattern(pattern)
        attention = sla_layer_spec(submodules.attention_layer, sla, numbers)
        super().__init__(
            config,
            submodules=replace(submodules, attention_layer=attention),
            declared=declare(sla, numbers, get_pg_size(pg_collection.tp), config.kv_channels),
            pattern=pattern,
            pg_collection=pg_collection,
            **kwargs,
        )


def sla_hybrid_stack_spec(spec: ModuleSpec, sla: SLAConfig, pattern: str, vp_stage: int | None = None) -> ModuleSpec:
    """``spec``, of a hybrid model's stack, with skip-layer attention in its attention layers; nothing is modified.

    For a script that builds ``HybridModel`` itself, once for each model chunk.  Layers that predict further tokens stay
    standard ones.

    Args:
        spec: upstream's ``hybrid_stack_spec``, say, or one with layers of the script's own.
        sla: what skip-layer attention means in this model; its layers are the attention layers, ``*``.
        pattern: the whole model's ``--hybrid-layer-pattern``.
        vp_stage: the model chunk's, which ``HybridModel`` is given too.

    Raises:
        ValueError: where the stack is not upstream's ``HybridStack``, or ``pattern`` has another number of attention
            layers than ``sla``.
        SeamError: if upstream changed.
    """
    found = len(LayerNumbers.of_pattern(pattern).attention)
    if found != sla.num_layers:
        raise ValueError(f"the pattern {pattern!r} has {found} attention layers, expected {sla.num_layers}")
    return _with_stack(spec, SLAHybridStack, sla=sla, pattern=pattern, vp_stage=vp_stage)


def cross_layer_hybrid_stack_spec(
    spec: ModuleSpec, declared: Declarations, pattern: str, vp_stage: int | None = None
) -> ModuleSpec:
    """``spec``, of a hybrid model's stack, whose layers can share what is ``declared``; nothing is modified.

    The arguments and errors are those of :func:`sla_hybrid_stack_spec`; ``docs/cross-layer-tensors.md`` is about it.
    """
    return _with_stack(spec, CrossLayerHybridStack, declared=declared, pattern=pattern, vp_stage=vp_stage)


def _with_stack(spec: ModuleSpec, stack: type, **params: Any) -> ModuleSpec:
    HYBRID_CHECKPOINTED_FORWARD.require()  # A changed upstream is found now, not in the first step.
    if spec.module not in (HybridStack, NormedHybridStack):
        raise ValueError(
            f"{stack.__name__} replaces megatron.core.models.hybrid.hybrid_block.HybridStack; this spec has "
            f"{getattr(spec.module, '__qualname__', spec.module)} in its place"
        )
    return replace(spec, module=stack, params={**(spec.params or {}), **params})


def torch_attention_in_stack(spec: ModuleSpec) -> ModuleSpec:
    """``spec``, of a hybrid model's stack, with torch's core attention in its attention layers.

    In those of layers that predict further tokens too.  Raises ``ValueError`` where it is not upstream's.
    """
    attention = torch_attention_spec(spec.submodules.attention_layer)
    return replace(spec, submodules=replace(spec.submodules, attention_layer=attention))
