"""Pretrain a GPT or a hybrid model with Megatron's own trainer, with ``--sla`` or without.

One process for each rank, as Megatron's scripts; on a machine without a GPU it runs on gloo by itself:

    torchrun --nproc-per-node 2 -m sla_megatron.pretrain_gpt --sla --tensor-model-parallel-size 2 \\
        --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 \\
        --micro-batch-size 2 --train-iters 10 --eval-interval 10 --lr 1e-3 --mock-data \\
        --tokenizer-type NullTokenizer --vocab-size 255

Flags: Megatron's, ``--sla ...`` (``--help-sla`` lists these alone, at once) and ``--device``.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from argparse import Namespace
from functools import partial
from typing import Any

# Nothing heavier is imported here: Megatron's checkpoint writer starts a helper process that imports this module again.
from .common.errors import one_line_errors
from .common.launchers import end_with_parent

_PROGRAM_START = time.time()


def main() -> None:
    """Parse ``sys.argv``, then hand over to ``megatron.training.pretrain``."""
    from .common.flag_types import OneLineParser
    from .cpu.device import add_device_arg, megatron_device
    from .flags.sla_flags import add_sla_args, refuse_unknown_sla_flags

    if "--help-sla" in sys.argv[1:]:
        parser = OneLineParser(
            "sla-pretrain", epilog="sla-pretrain --help lists Megatron's flags too, in some seconds."
        )
        add_device_arg(add_sla_args(parser)).print_help()
        return
    with one_line_errors():
        refuse_unknown_sla_flags(sys.argv[1:])
    with megatron_device():
        from megatron.training import set_startup_timestamps

        set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
        args = _arguments()
        if args.inprocess_restart:
            _pretrain_restarting()
        else:
            _pretrain(args)


def _arguments() -> Namespace:
    """The command line's, settled and known to Megatron."""
    from .cpu.device import add_device_arg
    from .flags.arguments import parse_and_validate_args
    from .flags.entry_point import require_data_and_folders, require_pretraining
    from .flags.fused_kernels import switch_off_missing_kernels

    def check(args: Namespace) -> None:
        require_pretraining(args)
        switch_off_missing_kernels(args)

    return parse_and_validate_args(
        extra_args_provider=add_device_arg,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        check=check,
        check_validated=require_data_and_folders,
    )


def _pretrain_restarting() -> None:
    """Train, and where a rank fails do so again in the same processes.

    Upstream's script wraps ``pretrain`` alone, which finds no arguments in a second attempt, since they are forgotten
    after the first.  Here an attempt begins with the command line, and so with the number that its rank has in it.
    """
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars
    from megatron.training.inprocess_restart import maybe_wrap_for_inprocess_restart
    from nvidia_resiliency_ext.inprocess import CallWrapper

    def attempt(store, attempts=None):
        # What was settled before the first one, to refuse it early; later ones find none.
        destroy_global_vars()
        destroy_num_microbatches_calculator()
        _pretrain(_arguments(), store=store, inprocess_call_wrapper=attempts)

    # As types, not as text: what tells the package which argument it is to pass.
    attempt.__annotations__ = {"attempts": CallWrapper}
    restarting, store = maybe_wrap_for_inprocess_restart(attempt)
    restarting(store)


def _pretrain(args: Namespace, **in_process: Any) -> None:
    """Build what ``args`` describe and train it; ``in_process`` is upstream's for an attempt that may be repeated."""
    # Megatron is imported here, on the device that was chosen.
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from .flags.arguments import megatron_refusals
    from .model.builder import model_config_from_args
    from .model.report import report_model
    from .training.checkpoint_writer import carry_tokenizer_along, find_sharded_parameters, shield_checkpoint_writer
    from .training.data import train_valid_test_datasets
    from .training.further_tokens import embedding_ranks
    from .training.loss import forward_step
    from .training.save_file import heed_save_file

    with one_line_errors(), megatron_refusals():
        model_config = model_config_from_args(args)
        container = pretrain_cfg_container_from_args(args, model_config)
    report_model(model_config)
    shield_checkpoint_writer(args)
    carry_tokenizer_along(args)
    find_sharded_parameters(args)
    heed_save_file(args)
    pretrain(
        container,
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=partial(embedding_ranks, args),
        **in_process,
    )


if __name__ == "__main__":
    main()
elif multiprocessing.current_process().name != "MainProcess":
    # That helper.  It hears no --exit-signal (checkpoint_writer.py), and would outlive a rank that is killed.
    end_with_parent(signal.SIGKILL)
