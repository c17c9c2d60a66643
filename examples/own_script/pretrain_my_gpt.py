"""Skip-layer attention in a Megatron script of your own: three imports come from here in place of Megatron's.

    torchrun --nproc-per-node 2 examples/own_script/pretrain_my_gpt.py --sla --tensor-model-parallel-size 2 \\
        --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 \\
        --micro-batch-size 2 --train-iters 10 --eval-interval 10 --lr 1e-3 --mock-data \\
        --tokenizer-type NullTokenizer --vocab-size 255

Everything that is marked (1) to (3) is what the script changed; the rest is any Megatron script.
"""

from __future__ import annotations

from argparse import ArgumentParser

from sla_megatron import megatron_device  # (1) to run without a GPU, or from megatron-core's wheel


def add_my_args(parser: ArgumentParser) -> ArgumentParser:
    parser.add_argument("--my-flag", default="mine", help="A flag of the script's own.")
    return parser


def main() -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from sla_megatron import (
        gpt_config_from_args,  # (2) was: megatron.training.argument_utils
        parse_and_validate_args,  # (3) was: megatron.training.arguments
    )
    from sla_megatron.training.data import train_valid_test_datasets
    from sla_megatron.training.loss import forward_step

    args = parse_and_validate_args(extra_args_provider=add_my_args)
    model_config = gpt_config_from_args(args)
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    with megatron_device([]):
        main()
