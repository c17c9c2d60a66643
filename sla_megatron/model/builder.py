"""Build a skip-layer model, a GPT or a hybrid one, with Megatron's own model builder."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as upstream_hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.argument_utils import gpt_config_from_args as upstream_gpt_config_from_args
from megatron.training.argument_utils import hybrid_config_from_args as upstream_hybrid_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from ..attention.sla_config import SLAConfig
from ..common.errors import FlagError, one_line_errors
from ..common.patterns import kinds
from ..cpu.backend import cpu_backend_is_active
from ..flags import rope_scaling
from ..flags.asked import has_torch_attention, hybrid_pattern, is_local
from ..flags.skipping import sla_config_from_args
from ..flags.sla_flags import MEGATRON, SDPA
from ..upstream.adapters.model_configs import config_of_class
from ..upstream.seams import Reliance
from .hybrid_specs import LOCAL_KINDS, local_hybrid_stack_spec
from .hybrid_stack import sla_hybrid_stack_spec, torch_attention_in_stack
from .mamba_parts import built_with_mamba
from .transformer_block import sla_transformer_blocks

#: Called with whatever it is given, so that no signature is assumed; and what names the class that does so.
OVERRIDDEN = (
    Reliance(
        "megatron.training.models.gpt:GPTModelBuilder.build_model",
        "overridden by SLAGPTModelBuilder, to have SLA blocks built",
    ),
    Reliance(
        "megatron.training.models.gpt:GPTModelConfig.builder",
        "overridden by SLAGPTModelConfig, which names that builder",
    ),
    Reliance(
        "megatron.training.models.hybrid:HybridModelBuilder.build_model",
        "overridden by SLAHybridModelBuilder, to give it a spec of SLA stacks",
    ),
    Reliance(
        "megatron.training.models.hybrid:HybridModelConfig.builder",
        "overridden by SLAHybridModelConfig, which names that builder",
    ),
)

ModelConfig = GPTModelConfig | HybridModelConfig


def model_config_from_args(args: Namespace, **kwargs: Any) -> ModelConfig:
    """Of the model that ``args`` ask for: with ``--hybrid-layer-pattern`` a hybrid one, else a GPT.

    ``kwargs`` go to :func:`hybrid_config_from_args` or :func:`gpt_config_from_args`.
    """
    return (hybrid_config_from_args if hybrid_pattern(args) else gpt_config_from_args)(args, **kwargs)


def gpt_config_from_args(args: Namespace, **kwargs: Any) -> GPTModelConfig:
    """Stands where a script calls Megatron's ``gpt_config_from_args``: the same, and with ``--sla`` a skip-layer model.

    Without ``--sla`` and ``--core-attention sdpa`` it returns upstream's own result, in which ``--rope-scaling-factor``
    counts.  ``kwargs`` go to upstream's function.

    Raises:
        ValueError: with ``--sla`` and a ``model_config_cls``, as for ModelOpt: SLA needs a class of its own.
    """
    if sla_config_from_args(args) is None and not has_torch_attention(args):
        return _with_rope_scaling(upstream_gpt_config_from_args(args, **kwargs), args)
    _require_own_class(args, kwargs)
    model_config = config_of_class(upstream_gpt_config_from_args, SLAGPTModelConfig, args, **kwargs)
    _set_attention(model_config, args)
    if model_config.sla is not None and model_config.sla.kv_projection == "pruned":
        # Layers differ in shape, so that a checkpoint cannot hold them as one tensor stacked over the layers.
        model_config.transformer.hetereogenous_dist_checkpoint = True
    return _with_rope_scaling(model_config, args)


def hybrid_config_from_args(args: Namespace, **kwargs: Any) -> HybridModelConfig:
    """Stands where a script calls Megatron's ``hybrid_config_from_args``: with ``--sla`` attention layers share K/V.

    With ``--transformer-impl local`` it is a model without Transformer Engine then, as on the CPU, without ``--sla``
    too; upstream has none.  Otherwise it returns upstream's own result.  ``kwargs`` go to upstream's function.

    Raises:
        FlagError: for layers that a model without Transformer Engine has not.
        ValueError: with ``--sla`` and a ``model_config_cls``, as for ModelOpt: SLA needs a class of its own.
    """
    is_own = sla_config_from_args(args) is not None or has_torch_attention(args)
    if not is_own and not (is_local(args) and cpu_backend_is_active()):
        return upstream_hybrid_config_from_args(args, **kwargs)
    _require_own_class(args, kwargs)
    model_config = config_of_class(upstream_hybrid_config_from_args, SLAHybridModelConfig, args, **kwargs)
    _set_attention(model_config, args)
    if is_without_engine(model_config) and set(kinds(args.hybrid_layer_pattern)) - set(LOCAL_KINDS):
        accepted = f"layers of {' '.join(LOCAL_KINDS)} with --transformer-impl local"
        raise FlagError("--hybrid-layer-pattern", args.hybrid_layer_pattern, accepted)
    return model_config


def is_without_engine(model_config: HybridModelConfig) -> bool:
    """Whether its stack is the local one: upstream's documentation has users name upstream's, which is never that."""
    given = model_config.hybrid_stack_spec
    is_upstreams = given is None or given is upstream_hybrid_stack_spec
    return model_config.transformer.transformer_impl == "local" and is_upstreams


def _require_own_class(args: Namespace, kwargs: dict[str, Any]) -> None:
    if "model_config_cls" in kwargs:
        made = "--sla builds an SLA model" if args.sla else "--core-attention builds a model of its own"
        raise ValueError(f"{made}, not one of {kwargs['model_config_cls'].__name__}")


def _set_attention(model_config: SLAGPTModelConfig | SLAHybridModelConfig, args: Namespace) -> None:
    model_config.sla = sla_config_from_args(args)
    model_config.core_attention = getattr(args, "core_attention", MEGATRON)
    model_config.needs_masks = args.reset_attention_mask


def _with_rope_scaling(model_config: GPTModelConfig, args: Namespace) -> GPTModelConfig:
    """``model_config`` with the factor of ``args``, where upstream has a constant.

    ``args``, which checkpoints hold, say so from here on.
    """
    if args.use_rope_scaling:
        model_config.rope_scaling_factor = args.rope_scaling_factor
        setattr(args, rope_scaling.HONOURED, True)
    return model_config


@dataclass(kw_only=True)
class SLAGPTModelConfig(GPTModelConfig):
    """Megatron's ``GPTModelConfig`` with ``sla``, what skip-layer attention means in this model (None: it is dense).

    ``core_attention`` is what ``--core-attention`` says.  ``needs_masks``, with ``--reset-attention-mask``: in training
    each stage must be handed a mask.
    """

    builder: ClassVar[str] = "sla_megatron.model.builder.SLAGPTModelBuilder"
    sla: SLAConfig | None = None
    core_attention: str = MEGATRON
    needs_masks: bool = False


@dataclass(kw_only=True)
class SLAHybridModelConfig(HybridModelConfig):
    """Megatron's ``HybridModelConfig`` with the same; ``sla`` counts the attention layers of the pattern alone."""

    builder: ClassVar[str] = "sla_megatron.model.builder.SLAHybridModelBuilder"
    sla: SLAConfig | None = None
    core_attention: str = MEGATRON
    needs_masks: bool = False


class SLAGPTModelBuilder(GPTModelBuilder):
    """Megatron's ``GPTModelBuilder``, whose models build the blocks that ``sla`` and ``core_attention`` ask for."""

    def build_model(self, *args: Any, **kwargs: Any) -> GPTModel:
        """One model chunk; arguments are upstream's (``pg_collection, pre_process, post_process, vp_stage``)."""
        config = self._model_config
        with sla_transformer_blocks(config.sla, torch_attention=config.core_attention == SDPA):
            model = super().build_model(*args, **kwargs)
        if config.needs_masks:
            model.register_forward_pre_hook(_require_mask, with_kwargs=True)
        return model


class SLAHybridModelBuilder(HybridModelBuilder):
    """Megatron's ``HybridModelBuilder``, whose models build the stacks that ``sla`` and ``core_attention`` ask for."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> HybridModel:
        """One model chunk; arguments are upstream's.

        Raises ``ValueError`` for a spec of another stack than upstream's.
        """
        # Not dataclasses.replace: a configuration hands some of its fields on to the transformer's.
        config = copy.copy(self._model_config)
        config.hybrid_stack_spec = self._stack_spec(vp_stage)
        build = partial(HybridModelBuilder(config).build_model, pg_collection, pre_process, post_process, vp_stage)
        model = built_with_mamba(config.hybrid_layer_pattern, build)
        if config.needs_masks:
            model.register_forward_pre_hook(_require_mask, with_kwargs=True)
        return model

    def _stack_spec(self, vp_stage: int | None) -> ModuleSpec:
        config = self._model_config
        spec = config.hybrid_stack_spec or upstream_hybrid_stack_spec
        if is_without_engine(config):
            spec = local_hybrid_stack_spec(config.transformer)
        if config.core_attention == SDPA:
            spec = torch_attention_in_stack(spec)
        if config.sla is not None:
            spec = sla_hybrid_stack_spec(spec, config.sla, config.hybrid_layer_pattern, vp_stage)
        return spec


def _require_mask(model: MegatronModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """End a run whose ``get_batch`` leaves a stage without the mask, as upstream's does between the ends."""
    if not (model.training and torch.is_grad_enabled()):
        return
    if kwargs.get("attention_mask", args[2] if len(args) > 2 else None) is None:
        with one_line_errors(all_ranks=True):
            raise FlagError(
                "--reset-attention-mask",
                True,
                "batches with a mask on every stage of the pipeline, as those of sla_megatron.training.data: "
                "upstream's get_batch has none between the first and the last",
            )
