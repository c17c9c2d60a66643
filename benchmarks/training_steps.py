"""Megatron's training step on a model that Megatron's flags describe, without its data and logs.

Several such models can live in one process and take turns, which the trainer itself does not offer.  The parts are the
trainer's own: its flags, model builder, data-parallel wrapper, schedule, gradient finalisation and optimizer.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sla_megatron.attention.declared import declare
from sla_megatron.attention.numbering import LayerNumbers
from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.commands.plan.compute import ModelWork, stage_operations
from sla_megatron.common.errors import StartError
from sla_megatron.common.presets import preset_flags
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.payload import MicrobatchShape
from sla_megatron.pipeline.routes import RoutePlan

from .record import ROOT

#: Named models that are no preset: for a processor.
SMALL_MODELS = {
    "tiny": "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --position-embedding-type learned_absolute",
    "tiny-rope-gqa": "--num-layers 4 --hidden-size 96 --num-attention-heads 12 --group-query-attention "
    "--num-query-groups 4 --position-embedding-type rope --normalization RMSNorm --disable-bias-linear",
    "small": "--num-layers 12 --hidden-size 384 --num-attention-heads 12 --position-embedding-type learned_absolute",
    "shallow": "--num-layers 4 --hidden-size 384 --num-attention-heads 12 --position-embedding-type learned_absolute",
    "small-rope-gqa": "--num-layers 12 --hidden-size 384 --num-attention-heads 12 --group-query-attention "
    "--num-query-groups 4 --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights",
}

#: What a variant adds to the model's flags.
VARIANTS = {"dense": [], "full": ["--sla"], "pruned": ["--sla", "--sla-kv-projection", "pruned"]}

_SMALL_VOCABULARY, _VOCABULARY = 4095, 50257


def model_flags(model: str) -> list[str]:
    """The flags of one of :data:`SMALL_MODELS`, or of presets, in one word with ``+`` between them.

    Raises:
        ValueError: for another name.
    """
    common = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--hidden-dropout", "0", "--attention-dropout", "0"]
    if model in SMALL_MODELS:
        return [*shlex.split(SMALL_MODELS[model]), *common, "--vocab-size", str(_SMALL_VOCABULARY), "--lr", "1e-4"]
    try:
        flags = preset_flags(model.replace("+", " "))
    except StartError as error:
        known = ", ".join([*SMALL_MODELS, *sorted(p.stem for p in (ROOT / "launch/presets").glob("*.flags"))])
        raise ValueError(f"--models {model}: expected some of {known}, presets with + between them") from error
    return [*flags, *common, "--vocab-size", str(_VOCABULARY)]


def settle(flags: Sequence[str]) -> Namespace:
    """Megatron's arguments of ``flags``, validated; of ``torchrun``'s world."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    from sla_megatron.cpu.device import add_device_arg
    from sla_megatron.flags.arguments import settled_args
    from sla_megatron.flags.fused_kernels import switch_off_missing_kernels

    before, sys.argv = sys.argv, ["benchmark", *flags]
    try:
        args = settled_args(
            add_device_arg, args_defaults={"tokenizer_type": "NullTokenizer"}, check=switch_off_missing_kernels
        )
    finally:
        sys.argv = before
    args.padded_vocab_size = calculate_padded_vocab_size(
        args.vocab_size + 1, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    return args


class TrainingSteps:
    """One model, its optimizer, and steps on random tokens.

    Args:
        args: of :func:`settle`, model parallelism being initialised as they say.
    """

    def __init__(self, args: Namespace) -> None:
        from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.process_groups_config import ProcessGroupCollection

        from sla_megatron.model.builder import gpt_config_from_args

        self.args = args
        config = gpt_config_from_args(args)
        config.transformer.finalize_model_grads_func = finalize_model_grads
        self.sla: SLAConfig | None = getattr(config, "sla", None)
        self._transformer = config.transformer
        self.chunks = config.get_builder_cls()(config).build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(),
            DistributedDataParallelConfig(grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32),
            **({} if args.bf16 or args.fp16 else {"mixed_precision_wrapper": None}),
        )
        optimizer = OptimizerConfig(lr=args.lr, bf16=args.bf16, params_dtype=args.params_dtype, clip_grad=1.0)
        self.optimizer = get_megatron_optimizer(optimizer, self.chunks)
        self._run = get_forward_backward_func()

    @property
    def parameters(self) -> int:
        """Of this rank."""
        return sum(parameter.numel() for chunk in self.chunks for parameter in chunk.parameters())

    @property
    def microbatches(self) -> int:
        """Of one step; all ranks of the benchmark are one pipeline."""
        return self.args.global_batch_size // self.args.micro_batch_size

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.args.global_batch_size * self.args.seq_length

    @property
    def operations(self) -> float:
        """Floating-point operations of one step, over all ranks: matrix multiplications, attention as causal."""
        work, shape, layout, sla = self._planned()
        stages = stage_operations(work, shape, layout, sla, dense=self.sla is None)
        return self.microbatches * sum(forward + backward for forward, backward in stages)

    @property
    def sent_bytes(self) -> int:
        """What crosses all hops in one step, forward and backward, as the transport plans it."""
        _, shape, layout, sla = self._planned()
        # Of a dense model nothing is declared.
        plan = RoutePlan(declare(sla, LayerNumbers.of_gpt(sla.num_layers), 1, self.args.kv_channels), layout)
        elements = sum(shape.payload_elements(plan.hop_columns(hop)) for hop in range(layout.num_stages - 1))
        return 2 * self.microbatches * elements * self._transformer.pipeline_dtype.itemsize

    def _planned(self) -> tuple[ModelWork, MicrobatchShape, PipelineLayout, SLAConfig]:
        """What the planner calls this model; a dense one is a skip-layer one in which nothing skips."""
        from sla_megatron.commands.plan.settle import microbatch_shape, model_work
        from sla_megatron.pipeline.megatron_layout import pipeline_layout

        groups = self.args.num_query_groups if self.args.group_query_attention else self.args.num_attention_heads
        sla = self.sla or SLAConfig(self.args.num_layers, groups, (self.args.num_layers,), 0)
        return (
            model_work(self.args, self._transformer),
            microbatch_shape(self.args),
            pipeline_layout(self._transformer),
            sla,
        )

    def step(self) -> None:
        """Forward and backward passes of all microbatches, gradient finalisation and an optimizer step."""
        self.passes()
        self.optimizer.step()

    def passes(self) -> None:
        """A step without its optimizer's."""
        import torch

        shape = (self.args.micro_batch_size, self.args.seq_length + 1)
        tokens = torch.randint(self.args.vocab_size, shape, device="cuda")
        positions = torch.arange(self.args.seq_length, device="cuda").expand(shape[0], -1)
        mask = None
        if self.args.create_attention_mask_in_dataloader:
            # As upstream's own masks: True where attention is masked.
            ones = torch.ones(1, 1, self.args.seq_length, self.args.seq_length, dtype=torch.bool, device="cuda")
            mask = ones.triu_(1)

        def forward_step(_: Iterator[Any] | None, chunk: Any) -> tuple[Any, Callable[..., Any]]:
            losses = chunk(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
            return losses, lambda output: (output.float().mean(), {})

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(
            forward_step_func=forward_step,
            data_iterator=[None] * len(self.chunks) if len(self.chunks) > 1 else None,
            model=self.chunks,
            num_microbatches=self.microbatches,
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=False,
        )
