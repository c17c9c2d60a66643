"""What ``--sla-kv-projection pruned`` needs: an optimizer, and rows that the tensor-parallel ranks can divide."""

from __future__ import annotations

from argparse import Namespace

from ..attention.sla_config import KINDS, SLAConfig
from ..common.errors import FlagError
from .asked import layer_numbers
from .skipping import sla_config_from_args

_OPTIMIZERS = ("adam", "sgd")


def check_projection(args: Namespace) -> None:
    """Raise :class:`FlagError` where validated arguments cannot have pruned projections."""
    if args.sla_kv_projection != "pruned":
        return
    if getattr(args, "attention_output_gate", False):
        raise FlagError("--sla-kv-projection", "pruned", "full with --attention-output-gate")
    if args.optimizer not in _OPTIMIZERS:
        raise FlagError("--optimizer", args.optimizer, f"{' or '.join(_OPTIMIZERS)} with --sla-kv-projection pruned")
    sla, size = sla_config_from_args(args), args.tensor_model_parallel_size
    what = f"{sla.shared_name} groups" if sla.share == "kv" else sla.shared_name
    for layer in range(1, sla.num_layers + 1):
        for kind in KINDS:
            live = sla.live_groups(layer, kind)
            shares = [sum(g in sla.rank_groups(size, rank) for g in live) for rank in range(size)]
            if len(set(shares)) > 1:
                raise FlagError(
                    "--sla-kv-projection",
                    "pruned",
                    f"full, or live {what} that are divisible by TP: layer {layer} has {len(live)}, "
                    f"{'+'.join(map(str, shares))} on the {size} tensor-parallel ranks",
                )
    _check_quantized_rows(args, sla)


def _check_quantized_rows(args: Namespace, sla: SLAConfig) -> None:
    """Products in fp8 and fp4 need matrices of some multiple of rows: what is left out must leave one."""
    if not (args.fp8 or args.fp4):
        return
    from megatron.core.fp8_utils import get_fp8_align_size, is_first_last_bf16_layer

    # What fp4's kernels load are 16 bytes at a time; upstream's get_fp4_align_size is larger, and of tokens.
    multiple = get_fp8_align_size(args.fp8_recipe) if args.fp8 else 32
    numbers = layer_numbers(args)
    for layer in range(1, sla.num_layers + 1):
        heads = args.num_attention_heads + sla.num_live(layer)
        rows = heads // args.tensor_model_parallel_size * args.kv_channels
        if rows % multiple and not is_first_last_bf16_layer(args, numbers.in_stack(layer) - 1):
            recipe = f"--fp8-recipe {args.fp8_recipe}" if args.fp8 else f"--fp4-recipe {args.fp4_recipe}"
            raise FlagError(
                "--sla-kv-projection",
                "pruned",
                f"full, or with {recipe} rows of linear_qkv in multiples of {multiple}: layer {layer} has {rows} on a "
                "tensor-parallel rank",
            )
