"""Build a skip-layer GPT with Megatron's own model builder."""

from __future__ import annotations

import inspect
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.argument_utils import gpt_config_from_args as upstream_gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec

from ..attention.core_attention import MEGATRON, SDPA, torch_attention_spec
from ..attention.sla_config import SLAConfig
from ..flags.validation import sla_config_from_args
from .layer_specs import sla_layer_spec
from .transformer_block import sla_transformer_blocks

Spec = ModuleSpec | TransformerBlockSubmodules


def gpt_config_from_args(args: Namespace, **kwargs: Any) -> GPTModelConfig:
    """Stands where a script calls Megatron's ``gpt_config_from_args``: the same, and with ``--sla`` a skip-layer model.

    Without ``--sla`` and ``--core-attention sdpa`` it returns upstream's own result.  ``kwargs`` go to upstream's
    function.

    Raises:
        ValueError: with ``--sla`` and a ``model_config_cls``, as for ModelOpt: SLA needs a class of its own.
    """
    sla = sla_config_from_args(args)
    core_attention = getattr(args, "core_attention", MEGATRON)
    if sla is None and core_attention == MEGATRON:
        return upstream_gpt_config_from_args(args, **kwargs)
    if "model_config_cls" in kwargs:
        made = "--sla builds an SLA model" if sla is not None else "--core-attention builds a model of its own"
        raise ValueError(f"{made}, not one of {kwargs['model_config_cls'].__name__}")
    model_config = upstream_gpt_config_from_args(args, model_config_cls=SLAGPTModelConfig, **kwargs)
    model_config.sla, model_config.core_attention = sla, core_attention
    if sla is not None and sla.kv_projection == "pruned":
        # Layers differ in shape, so that a checkpoint cannot hold them as one tensor stacked over the layers.
        model_config.transformer.hetereogenous_dist_checkpoint = True
    return model_config


@dataclass(kw_only=True)
class SLAGPTModelConfig(GPTModelConfig):
    """Megatron's ``GPTModelConfig`` with ``sla``, what skip-layer attention means in this model (None: it is dense).

    ``core_attention`` is what ``--core-attention`` says.
    """

    builder: ClassVar[str] = "sla_megatron.model.builder.SLAGPTModelBuilder"
    sla: SLAConfig | None = None
    core_attention: str = MEGATRON


class SLAGPTModelBuilder(GPTModelBuilder):
    """Megatron's ``GPTModelBuilder`` on the skip-layer version of the layer spec it would have used."""

    def build_model(self, *args: Any, **kwargs: Any) -> GPTModel:
        """One model chunk; arguments are upstream's (``pg_collection, pre_process, post_process, vp_stage``)."""
        config = self._model_config
        upstream_spec = config.transformer_layer_spec
        config.transformer_layer_spec = lambda config, vp_stage=None: _own_spec(
            _resolved(upstream_spec, config, vp_stage), config
        )
        try:
            with nullcontext() if config.sla is None else sla_transformer_blocks(config.sla):
                return super().build_model(*args, **kwargs)
        finally:
            config.transformer_layer_spec = upstream_spec


def _own_spec(spec: Spec, config: SLAGPTModelConfig) -> Spec:
    """``spec`` with the core attention and the self-attention that ``config`` asks for."""
    if config.core_attention == SDPA:
        spec = torch_attention_spec(spec)
    return spec if config.sla is None else sla_layer_spec(spec, config.sla)


def _resolved(spec: Any, config: GPTModelConfig, vp_stage: int | None) -> Spec:
    """The layer or block spec behind ``transformer_layer_spec``, as ``GPTModelBuilder.build_model`` resolves it."""
    if spec is None:
        return default_layer_spec(config, vp_stage)
    if callable(spec) and not isinstance(spec, ModuleSpec):
        if "vp_stage" in inspect.signature(spec).parameters:
            return spec(config, vp_stage=vp_stage)
        return spec(config)
    return spec
