"""The transformer block of a skip-layer model.

Megatron's models name their block's class; while one is built, that name is ours (:func:`sla_transformer_blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size

from ..attention.declared import declare
from ..attention.numbering import LayerNumbers
from ..attention.sla_config import SLAConfig
from ..pipeline.declarations import Declarations
from ..pipeline.megatron_layout import pipeline_layout
from ..upstream.seams import Reliance, Seam, replaced
from .crossing import CrossLayerBlock
from .layer_specs import Spec, sla_layer_spec, torch_attention_in_further_layers, torch_attention_spec
from .recomputation import CHECKPOINTED_FORWARD, checkpointed_forward
from .schedule_plan import install_sharing_in_plans

#: Called with whatever they are given, so that no signature is assumed.
OVERRIDDEN = (
    Reliance(
        "megatron.core.transformer.transformer_block:TransformerBlock.__init__",
        "overridden by SLATransformerBlock, to build SLA layers and plan what crosses its stage's ends",
    ),
    Reliance(
        "megatron.core.transformer.transformer_block:TransformerBlock.forward",
        "overridden by CrossLayerBlock, to open a microbatch",
    ),
)


class CrossLayerTransformerBlock(CrossLayerBlock, TransformerBlock):
    """Upstream's ``TransformerBlock``, whose layers make tensors that later ones read."""

    checkpoint_seams = (CHECKPOINTED_FORWARD,)
    # What dev calls; elsewhere a name that nothing calls.
    _checkpointed_forward = checkpointed_forward

    def share(self, declared: Declarations) -> None:
        """Have the layers share ``declared``, and the ends of this stage carry them.  Raises as ``join_pipeline``."""
        self.join_pipeline(declared, partial(pipeline_layout, self.config), self.vp_stage or 0)
        if self.config.overlap_moe_expert_parallel_comm:
            install_sharing_in_plans()


class DeclaredTransformerBlock(CrossLayerTransformerBlock):
    """Upstream's ``TransformerBlock``, whose layers share whatever tensors are declared.

    Args:
        spec: of a layer or of the block.
        declared: the tensors that its layers hand over and receive.
        layer_spec: makes, of ``spec``, the one that is built; the other arguments are upstream's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: Spec,
        *args: Any,
        declared: Declarations,
        layer_spec: Callable[[Spec], Spec] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, spec if layer_spec is None else layer_spec(spec), *args, **kwargs)
        self.share(declared)


class SLATransformerBlock(CrossLayerTransformerBlock):
    """Upstream's ``TransformerBlock``, whose forward is one microbatch of shared K/V.

    Args:
        spec: of a layer or of the block, with upstream's self-attention, which is replaced (``layer_specs.py``).
        sla: the model's skip-layer attention; the other arguments are upstream's.
    """

    def __init__(self, config: TransformerConfig, spec: Spec, *args: Any, sla: SLAConfig, **kwargs: Any) -> None:
        super().__init__(config, sla_layer_spec(spec, sla), *args, **kwargs)
        numbers, tensor_size = LayerNumbers.of_gpt(sla.num_layers), get_pg_size(self.pg_collection.tp)
        self.share(declare(sla, numbers, tensor_size, config.kv_channels))


def torch_attention_block(config: TransformerConfig, spec: Spec, *args: Any, block: Any, **kwargs: Any) -> Any:
    """``block``, a transformer block's class or what stands for it, with torch's function as its core attention."""
    return block(config, torch_attention_spec(spec), *args, **kwargs)


#: Where Megatron's models are that name their block's class, as ``TransformerBlock``.
GPT_MODEL = "megatron.core.models.gpt.gpt_model"
BERT_MODEL = "megatron.core.models.bert.bert_model"
VISION_MODEL = "megatron.core.models.vision.clip_vit_model"


def transformer_block_seam(sla: SLAConfig | None, module: str = GPT_MODEL, torch_attention: bool = False) -> Seam:
    """Have the model of ``module`` build its block, such as a GPT's decoder or a BERT's encoder, for ``sla``.

    Args:
        sla: what skip-layer attention means in the model; ``None``: it is dense.
        module: where the model names its block's class.
        torch_attention: whether its core attention is torch's.
    """
    block: Any = TransformerBlock if sla is None else partial(SLATransformerBlock, sla=sla)
    return _block_seam(module, partial(torch_attention_block, block=block) if torch_attention else block)


def _block_seam(module: str, block: Any) -> Seam:
    return Seam(
        f"{module}:TransformerBlock",
        "the model names its block's class there; only while an SLA model, or one with torch's attention, is built",
        ("config", "spec", "post_layer_norm", "pre_process", "post_process", "pg_collection", "vp_stage"),
        stand_in=block,
    )


def _torch_attention_further_block(config: TransformerConfig, spec: Any, *args: Any, **kwargs: Any) -> Any:
    return MultiTokenPredictionBlock(config, torch_attention_in_further_layers(spec), *args, **kwargs)


#: Layers that predict further tokens (``--mtp-num-layers``) have no skip heads: a GPT's own block of them stays.
FURTHER_LAYERS = Seam(
    f"{GPT_MODEL}:MultiTokenPredictionBlock",
    "the layers that predict further tokens have torch's core attention too; only while a model with it is built",
    (
        "config",
        "spec",
        "vp_stage",
        "pg_collection",
        "mtp_layer_pattern",
        "mtp_num_depths",
        "hybrid_submodules",
        "mamba_submodules",
        "name",
    ),
    stand_in=_torch_attention_further_block,
)


@contextmanager
def sla_transformer_blocks(
    sla: SLAConfig | None, model: type | None = None, torch_attention: bool = False
) -> Iterator[None]:
    """Within the block, ``GPTModel(...)`` builds its decoder as an :class:`SLATransformerBlock` for ``sla``.

    Args:
        sla: what skip-layer attention means in the model; ``None``: it is dense.
        model: another of Megatron's models, in place of ``GPTModel``: ``BertModel`` or ``CLIPViTModel``, whose
            attention looks both ways.
        torch_attention: whether its core attention is torch's, as with ``--core-attention sdpa``.

    Raises:
        SeamError: where the module of ``model`` does not name its block's class as Megatron's models do.
    """
    if sla is not None:
        CHECKPOINTED_FORWARD.require()  # A changed upstream is found now, not in the first step.
    module = GPT_MODEL if model is None else model.__module__
    seams = [transformer_block_seam(sla, module, torch_attention)]
    if torch_attention and module == GPT_MODEL:
        seams.append(FURTHER_LAYERS)
    with replaced(seams):
        yield


@contextmanager
def cross_layer_blocks(
    declared: Declarations, layer_spec: Callable[[Spec], Spec] | None = None, model: type | None = None
) -> Iterator[None]:
    """Within the block, ``GPTModel(...)`` builds its decoder so that its layers can share what is declared.

    ``docs/cross-layer-tensors.md`` is about it.

    Args:
        declared: the tensors that layers hand over and receive (``pipeline/waiting.py``).
        layer_spec: makes, of the layer or block spec that the model is given, the one that is built; ``None``: that.
        model: another of Megatron's models whose block is a ``TransformerBlock``, in place of ``GPTModel``.

    Raises:
        SeamError: where upstream changed, or the module of ``model`` does not name its block's class.
    """
    CHECKPOINTED_FORWARD.require()
    module = GPT_MODEL if model is None else model.__module__
    with replaced([_block_seam(module, partial(DeclaredTransformerBlock, declared=declared, layer_spec=layer_spec))]):
        yield
