"""What ``--core-attention sdpa`` does not go with, and what needs it."""

from __future__ import annotations

from argparse import Namespace

from ..attention.core_attention import RELIED_ON
from ..common.errors import OFF, Refusal, refuse
from .asked import PACKING, has_torch_attention, is_local
from .dev import say_how_keys_travel

_REFUSED: tuple[Refusal, ...] = (
    ("transformer_impl", ("local",), "local with --core-attention sdpa"),
    # p2p is Megatron's default, so that it is not known whether somebody asked for it.
    (
        "cp_comm_type",
        (None, ["p2p"], ["all_gather"]),
        "all_gather with --core-attention sdpa: it gathers keys and values",
    ),
    ("hierarchical_context_parallel_sizes", (None,), "one level with --core-attention sdpa"),
    ("hybrid_context_parallel", OFF, "no --hybrid-context-parallel with --core-attention sdpa"),
    ("window_size", OFF, "no --window-size with --core-attention sdpa"),
    ("softmax_type", ("vanilla",), "vanilla with --core-attention sdpa"),
    ("multi_latent_attention", OFF, "no multi-latent attention with --core-attention sdpa"),
)


_OTHERS = "--core-attention sdpa beside it, or Transformer Engine: Megatron's local attention cannot do it"

#: What Megatron's local attention has no notion of.
_BEYOND_LOCAL: tuple[Refusal, ...] = (
    ("context_parallel_size", (None, 1), _OTHERS),
    *((name, OFF, _OTHERS) for name in PACKING),
)


def resolve_core_attention(args: Namespace) -> None:
    """Check what the core attention of validated arguments cannot do, and with ``sdpa`` have no mask made that nobody
    reads, in place.

    Raises:
        FlagError: for what torch's function, or Megatron's local attention, does not do.
    """
    if not has_torch_attention(args):
        if is_local(args):
            refuse(args, _BEYOND_LOCAL)
        return
    for name in RELIED_ON:
        name.require()
    refuse(args, _REFUSED)
    say_how_keys_travel(args)
    if not (args.reset_attention_mask or args.reset_position_ids):
        # Attention that knows it is causal needs no [s, s] mask, and is faster without one.
        args.create_attention_mask_in_dataloader = False
