"""``--rope-scaling-factor``: Megatron 0.19 parses and stores it, and builds every model with 8.

Here it reaches the model, and the arguments that a checkpoint holds say so: without that mark its model had 8, whatever
the stored flag says.
"""

from __future__ import annotations

import os
from argparse import Namespace

from ..common.errors import FlagError

#: Argument that is true where the model has the factor that the flag says.
HONOURED = "rope_scaling_factor_honoured"

#: What upstream builds, ``GPTModelConfig.rope_scaling_factor``.
UPSTREAMS = 8.0

FLAG = "--rope-scaling-factor"


def model_factor(args: Namespace) -> float | None:
    """The factor in the model that was built from these arguments, as a checkpoint holds them; ``None``: no scaling."""
    if not getattr(args, "use_rope_scaling", False) or args.position_embedding_type != "rope":
        return None
    return float(args.rope_scaling_factor) if getattr(args, HONOURED, False) else UPSTREAMS


def adopt_rope_scaling(args: Namespace, saved: Namespace) -> None:
    """Take the scaling of a checkpoint's model, which upstream leaves behind, where ``args`` have none; in place."""
    theirs = model_factor(saved)
    if theirs is not None and not args.use_rope_scaling and args.rope_scaling_factor == UPSTREAMS:
        args.use_rope_scaling, args.rope_scaling_factor = True, theirs


def require_same_rope_scaling(args: Namespace, saved: Namespace, may_change: bool) -> None:
    """Refuse to go on from ``saved``, a checkpoint's arguments, with another factor or none; say so if ``may_change``.

    A checkpoint without scaling may be gone on from with it, as upstream has it.  Raises :class:`FlagError`.
    """
    theirs = model_factor(saved)
    if theirs is None or (args.use_rope_scaling and theirs == args.rope_scaling_factor):
        return
    if not args.use_rope_scaling:
        if not may_change:
            raise FlagError("--use-rope-scaling", "off", "on as in the checkpoint that is loaded, or --finetune")
        return
    was = f"{theirs:g}, which the model of the checkpoint has"
    stored = getattr(saved, "rope_scaling_factor", theirs)
    if stored != theirs:
        was += f" (its {FLAG} {stored:g} did not reach it: Megatron 0.19 ignores the flag)"
    if not may_change:
        raise FlagError(FLAG, f"{args.rope_scaling_factor:g}", f"{was}, or --finetune, to change it on purpose")
    if os.environ.get("RANK", "0") == "0":
        print(f"sla-megatron: {FLAG} {args.rope_scaling_factor:g} replaces {was}", flush=True)
