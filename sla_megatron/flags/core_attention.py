"""What ``--core-attention sdpa`` does not go with."""

from __future__ import annotations

from argparse import Namespace

from ..attention.core_attention import FORWARD
from ..common.errors import OFF, Refusal, refuse
from .sla_flags import MEGATRON, SDPA

_REFUSED: tuple[Refusal, ...] = (
    ("transformer_impl", ("local",), "local with --core-attention sdpa"),
    ("context_parallel_size", (1,), "1 with --core-attention sdpa: Transformer Engine's attention splits the context"),
    ("window_size", OFF, "no --window-size with --core-attention sdpa"),
    ("softmax_type", ("vanilla",), "vanilla with --core-attention sdpa"),
    ("multi_latent_attention", OFF, "no multi-latent attention with --core-attention sdpa"),
)


def resolve_core_attention(args: Namespace) -> None:
    """Check validated arguments with ``--core-attention sdpa``, and have no mask made that nobody reads, in place.

    Raises:
        FlagError: for what torch's function does not do.
    """
    if getattr(args, "core_attention", MEGATRON) != SDPA:
        return
    FORWARD.require()
    refuse(args, _REFUSED)
    if not (args.reset_attention_mask or args.reset_position_ids):
        # Attention that knows it is causal needs no [s, s] mask, and is faster without one.
        args.create_attention_mask_in_dataloader = False
