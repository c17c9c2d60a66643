"""Of hybrid models, ``--hybrid-layer-pattern``: what does not go with ``--sla``, what Megatron's ``HybridModel`` does
not heed, and what its layers need.  The rows say what is in the sources of Megatron 0.19.2.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable

from ..common.errors import OFF
from ..common.patterns import ATTENTION, EXPERTS, FURTHER_TOKENS, STAGE_END, kinds, segments
from ..cpu.backend import cpu_backend_is_active
from .asked import has_torch_attention, hybrid_pattern, is_local
from .rows import Row

#: Layers that K/V are shared between, or pass by: attention, MLP, experts, Mamba, gated delta networks.
_PASSED_BY = frozenset("*-EMG")
#: Symbol of a kind of layer -> the packages, by their modules' names, that Megatron's own layer of it runs on, on GPUs.
_PACKAGES = {
    "M": {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "einops": "einops"},
    "G": {"fla": "flash-linear-attention"},
}
#: The flag and its older name.
NAMES = ("hybrid_layer_pattern", "hybrid_override_pattern")
_UPSTREAMS_SPECS = ("megatron.core.models.hybrid.hybrid_layer_specs", "megatron.core.models.mamba.mamba_layer_specs")


def _kinds(args: Namespace) -> str:
    """The layers of a hybrid model, one symbol each; of a GPT ``""``."""
    return kinds(hybrid_pattern(args) or "")


def _of_pattern(accepted: str, when: Callable[[Namespace], object]) -> tuple[Row, ...]:
    """A row for each name of the flag, for a pattern of which ``when`` holds."""
    return tuple(Row(name, (None,), accepted, when) for name in NAMES)


def _has_own_spec(args: Namespace) -> bool:
    """Whether layers are those that ``--spec`` names, and none of Megatron's."""
    return args.spec is not None and args.spec[0] not in _UPSTREAMS_SPECS


def _does_not_divide(args: Namespace) -> bool:
    """Whether a pattern without ``|`` leaves ranks of a pipeline with other numbers of layers than Megatron gives."""
    pattern = hybrid_pattern(args)
    if pattern is None or STAGE_END in pattern:
        return False
    from ..pipeline.megatron_layout import hybrid_layout

    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    try:
        hybrid_layout(pattern, args.pipeline_model_parallel_size, first, last)
    except ValueError:
        return True
    return False


def _is_ours(args: Namespace) -> bool:
    """Whether the stack is one of ours, which local layers go into, and not Megatron's own."""
    return bool(args.sla or (is_local(args) and (cpu_backend_is_active() or has_torch_attention(args))))


def _empties_its_input(args: Namespace) -> bool:
    """Whether Megatron's own stack is to have a stage without layers between others.

    It returns its input itself there, which the schedule empties once it is sent: the gradients of the stages before
    are wrong, and nothing says so.  Our stacks return a copy.
    """
    return not _is_ours(args) and "" in segments(hybrid_pattern(args) or "")[1:-1]


def _splits_mamba_heads(args: Namespace) -> bool:
    """Whether Mamba's heads do not divide over their groups, or one of both over the tensor-parallel ranks."""
    if "M" not in _kinds(args):
        return False
    size, groups = args.tensor_model_parallel_size, args.mamba_num_groups
    heads = args.mamba_num_heads or 2 * args.hidden_size // args.mamba_head_dim
    return bool(heads % groups or heads % size or groups % size)


def _untried(name: str, what: str) -> Row:
    return Row(name, (*OFF, "none"), f"no {what} with --sla and a hybrid model, with which it was not tried", _kinds)


#: With ``--sla``.
WITH_SLA: tuple[Row, ...] = (
    *_of_pattern(
        "layers of * - E M G with --sla: others have no K/V groups to share, or were not tried",
        lambda args: set(_kinds(args)) - _PASSED_BY,
    ),
    *_of_pattern("at least one attention layer, *, with --sla", lambda args: ATTENTION not in _kinds(args)),
    _untried("use_torch_fsdp2", "--use-torch-fsdp2"),
    _untried("inprocess_restart", "--inprocess-restart"),
    _untried("cuda_graph_impl", "CUDA graph"),
    _untried("fine_grained_activation_offloading", "--fine-grained-activation-offloading"),
)


def _unheeded(name: str, fine: tuple = OFF, instead: str = "") -> Row:
    said = instead or "no such flag with --hybrid-layer-pattern"
    return Row(name, fine, f"{said}: Megatron's HybridModel does not heed it", _kinds)


#: With ``--sla`` and without.
HYBRID: tuple[Row, ...] = (
    *_of_pattern(
        "no /: layers that predict further tokens were not tried in a hybrid model",
        lambda args: FURTHER_TOKENS in hybrid_pattern(args),
    ),
    *_of_pattern(
        "no | without a pipeline: Megatron would build the layers before it alone",
        lambda args: STAGE_END in hybrid_pattern(args) and args.pipeline_model_parallel_size == 1,
    ),
    *_of_pattern(
        "no M or G without a GPU: their kernels are a GPU's",
        lambda args: cpu_backend_is_active() and not _has_own_spec(args) and set(_kinds(args)) & set(_PACKAGES),
    ),
    *_of_pattern(
        "layers of * - E M with --transformer-impl local",
        lambda args: is_local(args) and not _has_own_spec(args) and set(_kinds(args)) - set("*-EM"),
    ),
    *_of_pattern(
        "a layer in each stage between others without --sla: Megatron's own stack has wrong gradients then",
        _empties_its_input,
    ),
    *_of_pattern("a | at each stage's end, or layers that divide over the pipeline's ranks", _does_not_divide),
    *_of_pattern(
        "heads of M, 2 x --hidden-size / --mamba-head-dim or --mamba-num-heads, that --mamba-num-groups divides, and "
        "the tensor-parallel size both",
        lambda args: not _has_own_spec(args) and _splits_mamba_heads(args),
    ),
    *_of_pattern("--num-experts beside it, for E", lambda args: EXPERTS in _kinds(args) and not args.num_experts),
    Row(
        "num_experts", OFF, "an E in --hybrid-layer-pattern", lambda args: _kinds(args) and EXPERTS not in _kinds(args)
    ),
    Row(
        "mtp_num_layers",
        OFF,
        "no --mtp-num-layers with --hybrid-layer-pattern: Megatron's HybridModel does not heed it",
        lambda args: _kinds(args) and FURTHER_TOKENS not in hybrid_pattern(args),
    ),
    Row("mtp_hybrid_override_pattern", OFF, "no such flag: see --mtp-num-layers", _kinds),
    _unheeded(
        "position_embedding_type", ("learned_absolute", "rope", "yarn", "none"), "learned_absolute, rope or yarn"
    ),
    _unheeded("moe_layer_freq", (1,), "an E in --hybrid-layer-pattern for each layer with experts"),
    *map(
        _unheeded,
        (
            "use_rope_scaling",
            "rotary_interleaved",
            "qk_l2_norm",
            "linear_attention_freq",
            "heterogeneous_layers_config_path",
            "heterogeneous_layers_config_encoded_json",
        ),
    ),
    Row(
        "overlap_moe_expert_parallel_comm",
        OFF,
        "no such flag with --hybrid-layer-pattern: Megatron's HybridModel cannot run in pieces",
        _kinds,
    ),
    Row(
        "transformer_impl",
        ("transformer_engine", "inference_optimized"),
        "transformer_engine without --sla and --core-attention sdpa: Megatron's HybridModel has no other layers",
        lambda args: _kinds(args) and not _is_ours(args) and not _has_own_spec(args),
    ),
    Row(
        "qk_layernorm",
        OFF,
        "--transformer-impl local beside it: what Megatron builds a HybridModel of has no such norms",
        lambda args: _kinds(args) and not (is_local(args) or _has_own_spec(args)),
    ),
    Row(
        "attention_backend",
        ("auto", "flash", "fused", "unfused"),
        "another, or --transformer-impl local, with --hybrid-layer-pattern: Megatron's HybridModel has none but "
        "Transformer Engine's",
        lambda args: _kinds(args) and not is_local(args),
    ),
)


def _missing(kind: str, module: str) -> Callable[[Namespace], bool]:
    return lambda args: kind in _kinds(args) and not _has_own_spec(args) and importlib.util.find_spec(module) is None


#: What Megatron's own layers run on and what is not installed.
NOT_INSTALLED: tuple[Row, ...] = tuple(
    row
    for kind, packages in _PACKAGES.items()
    for module, package in packages.items()
    for row in _of_pattern(f"the package {package} for {kind}, which is not installed", _missing(kind, module))
)
