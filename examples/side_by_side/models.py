"""One of Megatron's models, dense and with skip-layer attention, of the same weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import ModuleSpec, TransformerConfig

from sla_megatron import SLAConfig, sla_layer_spec, sla_transformer_blocks
from sla_megatron.cpu.flags import CONFIG_ON_CPU
from sla_megatron.flags.sla_flags import SDPA
from sla_megatron.model.layer_specs import torch_attention_spec

Build = Callable[[TransformerConfig, ModuleSpec], torch.nn.Module]


def dense_and_sla(args: Namespace, seed: int, kind: type, spec: ModuleSpec, build: Build) -> dict[str, torch.nn.Module]:
    """The two models; all weights have the same names and shapes, and begin with the same values.

    Args:
        args: of the command.
        seed: of the weights, whatever the tensor-parallel size.
        kind: Megatron's model, whose module names its block's class.
        spec: of one of its layers.
        build: makes a model of a configuration and of such a spec.
    """
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    sla = SLAConfig(args.layers, args.heads, tuple(args.distance), args.skip_groups)
    spec = torch_attention_spec(spec) if args.core_attention == SDPA else spec
    models = {"dense": build(_config(args), spec).cuda()}
    # These two are all that skip-layer attention needs.
    with sla_transformer_blocks(sla, kind):
        models["sla"] = build(_config(args), sla_layer_spec(spec, sla)).cuda()
    models["sla"].load_state_dict(models["dense"].state_dict())
    return models


def _config(args: Namespace) -> TransformerConfig:
    return TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        ffn_hidden_size=4 * args.hidden,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Megatron's 0.02 is for wide models; a narrow one learns to attend many times later with it.
        init_method_std=args.hidden**-0.5,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        **CONFIG_ON_CPU,
    )
