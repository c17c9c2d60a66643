"""Pretrain a GPT with Megatron's own trainer, with ``--sla`` or without.

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
        _pretrain()


def _pretrain() -> None:
    # Megatron is imported here, on the device that was chosen.
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from .cpu.device import add_device_arg
    from .flags.arguments import megatron_refusals, parse_and_validate_args
    from .flags.entry_point import require_data_and_folders, require_pretraining
    from .flags.fused_kernels import switch_off_missing_kernels
    from .model.builder import gpt_config_from_args
    from .model.report import report_model
    from .training.checkpoint_writer import carry_tokenizer_along, find_sharded_parameters, shield_checkpoint_writer
    from .training.data import train_valid_test_datasets
    from .training.further_tokens import embedding_ranks
    from .training.loss import forward_step

    def check(args: Namespace) -> None:
        require_pretraining(args)
        switch_off_missing_kernels(args)

    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
    args = parse_and_validate_args(
        extra_args_provider=add_device_arg,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        check=check,
        check_validated=require_data_and_folders,
    )
    with one_line_errors(), megatron_refusals():
        model_config = gpt_config_from_args(args)
        container = pretrain_cfg_container_from_args(args, model_config)
    report_model(model_config)
    shield_checkpoint_writer(args)
    carry_tokenizer_along(args)
    find_sharded_parameters(args)
    pretrain(
        container,
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=partial(embedding_ranks, args),
    )


if __name__ == "__main__":
    main()
elif multiprocessing.current_process().name != "MainProcess":
    # That helper.  It hears no --exit-signal (checkpoint_writer.py), and would outlive a rank that is killed.
    end_with_parent(signal.SIGKILL)
