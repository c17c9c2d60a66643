"""What a checkpoint of ours needs beside Megatron's writer: to be finished after a signal, and to hold its tokenizer.

With FSDP2 and a new torch it needs a third thing, to be written at all.

A save that is under way when a job is told to end must not be cut short by the same signal.

Under ``--exit-signal-handler`` the ranks note the signal and go on to the end of their step, saves included.  Slurm
sends it to every process of the step, though, and with it to the process that holds the queue of Megatron's checkpoint
writer, which has no handler: it dies, and the save with it.  A save that is not asynchronous needs no such process,
which costs each rank two seconds of a core and more in its first save: here its queue is this process's own.  For
asynchronous ones the process is started early, deaf to the signal.  It ends with its rank all the same, however that
ends: ``pretrain_gpt.py``, which it imports, sees to that.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from queue import Queue
from typing import Any

from ..common.errors import first_line
from ..common.launchers import starting_deaf
from ..common.tokenizers import carry_files
from ..upstream.seams import Reliance, Seam, Wrapping, wrap_once

RESULTS_QUEUE = Reliance(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
    "called before training, with --async-save and --exit-signal-handler: the process behind the queue, which is made "
    "once and kept, must not hear --exit-signal",
    ("mp_mode",),
)


def results_here() -> Seam:
    """A queue of this process, for one that saves alone and at once."""
    return Seam(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
        "a save hands its results to itself through a process of its own, which imports torch to look at them",
        stand_in=Queue(),
    )


def shield_checkpoint_writer(args: Namespace) -> None:
    """Have saves do without the writer's helper process; with ``--async-save``, start it deaf to ``--exit-signal``."""
    if args.save is None or args.ckpt_format != "torch_dist":
        return
    if not args.async_save:
        queue = results_here()
        owner, name = queue.resolve()
        # Of an earlier attempt in this process, what its last save left there would be taken for the next one's.
        setattr(owner, name, queue.stand_in)
        return
    if not args.exit_signal_handler:
        return
    RESULTS_QUEUE.require()
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    with starting_deaf(args.exit_signal):
        get_write_results_queue()


def _parameters_own_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def to_local_if_dtensor(tensor: Any) -> Any:
        return getattr(tensor, "_local_tensor", tensor)

    return to_local_if_dtensor


LOCAL_TENSOR = Wrapping(
    "megatron.core.dist_checkpointing.optimizer:to_local_if_dtensor",
    "it is compared, by identity, with the tensor that a model's checkpoint holds of an FSDP2 parameter; from 2.15 on "
    "torch answers a parameter with another one each time, and nothing of the optimizer is found",
    ("tensor",),
    wrap=_parameters_own_memory,
)


def find_sharded_parameters(args: Namespace) -> None:
    """Have a checkpoint of this run find the optimizer's state of FSDP2 parameters; nothing without FSDP2."""
    if args.use_torch_fsdp2:
        wrap_once([LOCAL_TENSOR])


def _with_tokenizer(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_config(config: Any, checkpoint_dir: Any) -> Any:
        _carry_tokenizer(str(checkpoint_dir))
        return original(config, checkpoint_dir)

    return save_config


SAVE_CONFIG = Wrapping(
    "megatron.core.dist_checkpointing.serialization:save_config",
    "a checkpoint that is taken elsewhere needs its tokenizer: rank 0 puts it there before it writes the file that "
    "makes the checkpoint complete; from 0.20 on upstream does so itself",
    ("config", "checkpoint_dir"),
    wrap=_with_tokenizer,
)


def carry_tokenizer_along(args: Namespace) -> None:
    """Have every checkpoint of this run hold its tokenizer; nothing where upstream does so, or without ``--sla``."""
    import megatron.training.checkpointing as upstream

    wanted = args.save is not None and args.sla and args.ckpt_format == "torch_dist"
    if wanted and not hasattr(upstream, "save_tokenizer_assets"):
        wrap_once([SAVE_CONFIG])


def _carry_tokenizer(checkpoint: str) -> None:
    """A tokenizer that cannot be copied must not cost the checkpoint."""
    from megatron.training import get_args, get_tokenizer

    try:
        args, tokenizer = get_args(), get_tokenizer()
    except AssertionError:
        # Not Megatron's trainer: something else saves in this process.
        return
    # Another run of this process may be upstream's own; other stores than file systems are its affair.
    if not getattr(args, "sla", False) or "://" in checkpoint:
        return
    try:
        carry_files(args, tokenizer, Path(checkpoint))
    except Exception as error:  # transformers raises what it likes.
        print(f"sla-megatron: the tokenizer is not in {checkpoint}: {first_line(error)}", file=sys.stderr, flush=True)
