"""The pipelines that ``transport`` measures: a dense and a skip-layer GPT over all ranks, and a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

VOCABULARY = 512


@dataclass(frozen=True)
class Shape:
    """Model, layout and batch.  Every rank is a pipeline rank; microbatches hold one sequence each.

    Attributes:
        layers, hidden, heads, seq_length: of the model; as many K/V groups as heads.
        distance: the skip distance; three quarters of the groups skip.
        microbatches: of a step.
        ranks: pipeline ranks.
        chunks: virtual stages of each rank.
    """

    layers: int
    hidden: int
    heads: int
    seq_length: int
    distance: int
    microbatches: int
    ranks: int
    chunks: int

    @property
    def stages(self) -> int:
        """Virtual stages of all ranks; each holds as many layers."""
        return self.ranks * self.chunks

    @property
    def name(self) -> str:
        """Such as ``PP=2 x VPP=2``."""
        return f"PP={self.ranks}" + (f" x VPP={self.chunks}" if self.chunks > 1 else "")


def job_of(shape: Shape, element_bytes: int) -> Any:
    """The same run as ``sla-plan`` sees it."""
    from sla_megatron.commands.plan.compute import ModelWork
    from sla_megatron.commands.plan.job import Job
    from sla_megatron.pipeline.layout import PipelineLayout
    from sla_megatron.pipeline.payload import MicrobatchShape

    sizes = [shape.layers // shape.stages] * shape.stages
    return Job(
        sla=_sla(shape),
        layout=PipelineLayout.of_sizes(shape.ranks, sizes),
        shape=MicrobatchShape(shape.seq_length, 1, shape.hidden),
        work=ModelWork(shape.heads, shape.hidden // shape.heads, (2 * 4 * shape.hidden**2,) * shape.layers),
        element_bytes=element_bytes,
        num_gpus=shape.ranks,
        global_batch_size=shape.microbatches,
    )


def _sla(shape: Shape) -> Any:
    from sla_megatron.attention.sla_config import SLAConfig, default_num_skip_groups

    return SLAConfig(shape.layers, shape.heads, (shape.distance,), default_num_skip_groups(shape.heads))


def build(shape: Shape, dtype: Any, skips: bool) -> list[Any]:
    """This rank's model chunks, skip-layer or dense.  Model parallelism must have been initialised."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from sla_megatron.cpu.flags import CONFIG_ON_CPU
    from sla_megatron.model.builder import SLAGPTModelBuilder, SLAGPTModelConfig

    transformer = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=4 * shape.hidden,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_model_parallel_size=shape.ranks,
        virtual_pipeline_model_parallel_size=shape.chunks if shape.chunks > 1 else None,
        # As Megatron's trainer chooses them.
        pipeline_dtype=dtype,
        deallocate_pipeline_outputs=True,
        overlap_p2p_comm=shape.chunks > 1,
        batch_p2p_comm=shape.chunks == 1,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        **CONFIG_ON_CPU,
    )
    settings = {"transformer": transformer, "vocab_size": VOCABULARY, "seq_length": shape.seq_length}
    settings |= {"position_embedding_type": "rope"}
    if skips:
        builder: Any = SLAGPTModelBuilder(SLAGPTModelConfig(**settings, sla=_sla(shape)))
    else:
        builder = GPTModelBuilder(GPTModelConfig(**settings))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stages = range(shape.chunks) if shape.chunks > 1 else [None]
    return [builder.build_model(groups, vp_stage=stage).cuda().to(dtype) for stage in stages]


def train_step(model: list[Any], shape: Shape) -> None:
    """Forward and backward passes of all microbatches, random tokens; gradients dropped."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens = torch.randint(VOCABULARY, (1, shape.seq_length + 1), device="cuda")
    positions = torch.arange(shape.seq_length, device="cuda").expand(1, -1)

    def forward_step(_: Iterator[Any], chunk: Any) -> tuple[Any, Callable[..., Any]]:
        losses = chunk(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        return losses, lambda output: (output.float().mean(), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(model) if len(model) > 1 else None,
        model=model,
        num_microbatches=shape.microbatches,
        seq_length=shape.seq_length,
        micro_batch_size=1,
        forward_only=False,
    )
    for chunk in model:
        chunk.zero_grad(set_to_none=True)
