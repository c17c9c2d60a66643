"""Megatron's flags on the CPU: what needs CUDA is switched off, what cannot run is refused."""

from __future__ import annotations

import os
from argparse import Namespace

from ..common.errors import OFF, FlagError, Refusal, refuse

# Defaults that need CUDA: attribute, value on the CPU.  Changing one is reported, not refused: these are Megatron's
# defaults, and none of them changes what is computed.  The fused GELU stays: it is another function, the tanh
# approximation, and runs on CPUs too.
_ON_CPU = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "num_workers": 0,
}

#: The same for a model that is built without flags: fields of a ``TransformerConfig``.  They run on GPUs too.
CONFIG_ON_CPU = {
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}

# What was asked for and cannot be done.
_NEEDS_GPU: tuple[Refusal, ...] = (
    ("transformer_impl", ("local", "transformer_engine"), "local without a GPU, which is chosen by itself"),
    ("fp8", OFF, "no fp8 without a GPU"),
    ("fp4", OFF, "no fp4 without a GPU"),
    ("cuda_graph_impl", (*OFF, "none"), "none without a GPU"),
    ("enable_cuda_graph", OFF, "no CUDA graphs without a GPU"),
    ("external_cuda_graph", OFF, "no CUDA graphs without a GPU"),
    ("tp_comm_overlap", OFF, "no --tp-comm-overlap without a GPU"),
    ("moe_grouped_gemm", OFF, "no --moe-grouped-gemm without a GPU"),
    ("cross_entropy_loss_fusion", OFF, "no --cross-entropy-loss-fusion without a GPU"),
    ("use_megatron_fsdp", OFF, "no FSDP but --use-torch-fsdp2 without a GPU"),
)


def _refuse_recomputed_layernorm(args: Namespace) -> None:
    if "layernorm" in (getattr(args, "recompute_modules", None) or []):
        raise FlagError(
            "--recompute-modules",
            args.recompute_modules,
            "no layernorm without a GPU: upstream needs Transformer Engine",
        )


def fit_to_cpu(args: Namespace) -> None:
    """Switch off, in place, what needs CUDA, and say so in one line; call between parsing and validation.

    Raises :class:`FlagError` for what was asked for and cannot run without a GPU.
    """
    refuse(args, _NEEDS_GPU)
    _refuse_recomputed_layernorm(args)
    # Megatron insists on 1 with tensor parallelism and on more with FSDP2; here there are no connections to count.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8" if args.use_torch_fsdp2 else "1"
    changed = {name: value for name, value in _ON_CPU.items() if getattr(args, name) != value}
    vars(args).update(changed)
    if changed and os.environ.get("RANK", "0") == "0":
        listed = ", ".join(f"{name}={value}" for name, value in changed.items())
        print(f"sla-megatron: no GPU: {listed}", flush=True)
