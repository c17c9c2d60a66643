"""How many parameters the job's model has, and how large a checkpoint of it is, without building it."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from .finding import Skipped

#: Bytes of an element, by the type's name.
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


def parameter_count(args: Namespace, vocabulary: int | None) -> int:
    """Parameters of the whole model; all of its experts, no padding but the vocabulary's.

    Args:
        args: validated; call where Megatron may be imported.
        vocabulary: tokens of the tokenizer; None takes what the flags say.

    Raises:
        Skipped: for a model that is not counted here.
    """
    from ...model.parameters import Uncounted, model_parameters

    try:
        return model_parameters(model_config(args, vocabulary))
    except Uncounted as reason:
        raise Skipped(str(reason)) from None


def model_config(args: Namespace, vocabulary: int | None) -> Any:
    """The job's model, as its own configuration describes it."""
    from ...model.builder import model_config_from_args

    args = copy.copy(args)
    if args.padded_vocab_size is None and vocabulary is not None:
        args.vocab_size = vocabulary
    if args.padded_vocab_size is None and args.vocab_size is None:
        raise Skipped("the size of the vocabulary is not known")
    return model_config_from_args(args)


def checkpoint_bytes(args: Namespace, parameters: int) -> int:
    """Bytes of a checkpoint of ``parameters``: weights, and what the optimizer keeps for each."""
    return parameters * (args.params_dtype.itemsize + _optimizer_bytes(args))


def _optimizer_bytes(args: Namespace) -> int:
    """What an optimizer's state holds for a parameter: Adam's two moments or a momentum, and a master weight."""
    if args.no_save_optim:
        return 0
    moments = {"sgd": ("exp_avg_dtype",)}.get(args.optimizer, ("exp_avg_dtype", "exp_avg_sq_dtype"))
    state = sum(_width(getattr(args, name, None)) for name in moments)
    has_master = args.params_dtype.itemsize < 4 or args.use_distributed_optimizer
    return state + (_width(getattr(args, "main_params_dtype", None)) if has_master else 0)


def _width(dtype: Any) -> int:
    if hasattr(dtype, "itemsize"):
        return dtype.itemsize
    return _BYTES.get(str(dtype), 4)
