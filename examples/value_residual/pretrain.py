"""Pretrain a GPT with a value residual (``model.py``) with Megatron's own trainer, here in a pipeline of four stages.

    torchrun --nproc-per-node 2 -m examples.value_residual.pretrain \\
        --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --num-layers 4 --hidden-size 64 \\
        --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 \\
        --global-batch-size 8 --train-iters 10 --eval-interval 10 --lr 1e-3 --mock-data \\
        --tokenizer-type NullTokenizer --vocab-size 255
"""

from __future__ import annotations

from sla_megatron import megatron_device


def main() -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from examples.value_residual.model import value_residual
    from sla_megatron import gpt_config_from_args, parse_and_validate_args
    from sla_megatron.training.data import train_valid_test_datasets
    from sla_megatron.training.loss import forward_step

    args = parse_and_validate_args()
    model_config = gpt_config_from_args(args)
    # The one line that is new: the model is built within it.
    with value_residual(model_config.transformer):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            train_valid_test_datasets,
            ModelType.encoder_or_decoder,
            forward_step,
        )


if __name__ == "__main__":
    with megatron_device([]):
        main()
