"""Build a skip-layer GPT with Megatron's own model builder."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training.argument_utils import gpt_config_from_args as upstream_gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from ..attention.sla_config import SLAConfig
from ..common.errors import FlagError, one_line_errors
from ..flags import rope_scaling
from ..flags.sla_flags import MEGATRON, SDPA
from ..flags.validation import sla_config_from_args
from ..upstream.adapters.model_configs import config_of_class
from ..upstream.seams import Reliance
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
)


def gpt_config_from_args(args: Namespace, **kwargs: Any) -> GPTModelConfig:
    """Stands where a script calls Megatron's ``gpt_config_from_args``: the same, and with ``--sla`` a skip-layer model.

    Without ``--sla`` and ``--core-attention sdpa`` it returns upstream's own result, in which ``--rope-scaling-factor``
    counts.  ``kwargs`` go to upstream's function.

    Raises:
        ValueError: with ``--sla`` and a ``model_config_cls``, as for ModelOpt: SLA needs a class of its own.
    """
    sla = sla_config_from_args(args)
    core_attention = getattr(args, "core_attention", MEGATRON)
    if sla is None and core_attention == MEGATRON:
        return _with_rope_scaling(upstream_gpt_config_from_args(args, **kwargs), args)
    if "model_config_cls" in kwargs:
        made = "--sla builds an SLA model" if sla is not None else "--core-attention builds a model of its own"
        raise ValueError(f"{made}, not one of {kwargs['model_config_cls'].__name__}")
    model_config = config_of_class(upstream_gpt_config_from_args, SLAGPTModelConfig, args, **kwargs)
    model_config.sla, model_config.core_attention = sla, core_attention
    model_config.needs_masks = args.reset_attention_mask
    if sla is not None and sla.kv_projection == "pruned":
        # Layers differ in shape, so that a checkpoint cannot hold them as one tensor stacked over the layers.
        model_config.transformer.hetereogenous_dist_checkpoint = True
    return _with_rope_scaling(model_config, args)


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


def _require_mask(model: GPTModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
