"""A save that is under way when a job is told to end must not be cut short by the same signal.

Under ``--exit-signal-handler`` the ranks note the signal and go on to the end of their step, saves included.  Slurm
sends it to every process of the step, though, and with it to the process that holds the queue of Megatron's checkpoint
writer, which has no handler: it dies, and the save with it.  Here that process is started early, deaf to the signal.
It ends with its rank all the same, however that ends: ``pretrain_gpt.py``, which it imports, sees to that.
"""

from __future__ import annotations

import multiprocessing.resource_tracker
import signal
from argparse import Namespace

from ..upstream.seams import Reliance

RESULTS_QUEUE = Reliance(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
    "called before training, with --save and --exit-signal-handler: the process behind the queue, which is made once "
    "and kept, must not hear --exit-signal",
    ("mp_mode",),
)


def shield_checkpoint_writer(args: Namespace) -> None:
    """Start the writer's helper process deaf to ``--exit-signal``; nothing without ``--exit-signal-handler``."""
    if args.save is None or not args.exit_signal_handler or args.ckpt_format != "torch_dist":
        return
    RESULTS_QUEUE.require()
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    # Starting it unblocks signals; it would be started between the two lines below.
    multiprocessing.resource_tracker.ensure_running()
    # What is blocked here stays blocked in a process that is started meanwhile.
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {args.exit_signal})
    try:
        get_write_results_queue()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
