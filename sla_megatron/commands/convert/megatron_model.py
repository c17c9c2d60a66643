"""A Megatron model in this process, from flags: to be filled and saved, or to be asked for logits."""

from __future__ import annotations

import copy
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...common.errors import StartError
from ...cpu.device import megatron_device
from ...flags import rope_scaling
from .assemble import Assembler
from .errors import ConvertError

#: What the run that goes on will choose for itself; here it only has to be built.  The flags are Megatron's.
_HERE = (
    *("--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4", "--transformer-impl", "local"),
    *("--no-persist-layer-norm", "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"),
    *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion", "--use-cpu-initialization"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--distributed-backend", "gloo"),
)

#: How a checkpoint of ours is stored: Megatron's content metadata.
CONTENT: Mapping[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}

_TYPE_FLAGS = {torch.float32: (), torch.bfloat16: ("--bf16",), torch.float16: ("--fp16",)}


# Megatron sets them for a model's attention backend, and builds none where they are set otherwise.  They speak of
# kernels that a CPU does not have, whoever set them: a job's script, or the model before.
_OF_OTHER_KERNELS = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@contextmanager
def _without_variables(names: Sequence[str]) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def megatron_alone() -> Iterator[None]:
    """Within the block this process is a Megatron run of one rank, on the CPU."""
    with (
        warnings.catch_warnings(action="ignore"),
        _without_variables(_OF_OTHER_KERNELS),
        megatron_device(["--device", "cpu"]),
    ):
        import torch.distributed as dist
        from megatron.core import parallel_state, tensor_parallel

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def args_of(argv: Sequence[str], dtype: torch.dtype) -> Namespace:
    """Megatron's settled arguments for ``argv``, in a run of one rank.  Call within :func:`megatron_alone`.

    Raises:
        ConvertError: for what Megatron does not accept.
    """
    from ...flags.arguments import MegatronRefusal, settled_args

    try:
        return settled_args(will_run_here=False, argv=[*argv, *_HERE, *_TYPE_FLAGS[dtype]], silent=True)
    except StartError as error:
        complaint = error.complaint if isinstance(error, MegatronRefusal) else error.reason
        raise ConvertError(f"Megatron does not accept the model: {complaint}") from error


def build(args: Namespace) -> Any:
    """The ``GPTModel`` or ``HybridModel`` of ``args``, in evaluation mode, in ``args.params_dtype``.

    Of a pipeline, this rank's stage.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelConfig

    from ...model.builder import model_config_from_args

    # A copy: what a training run of ours writes into its arguments, for its checkpoints, is not to be found here.
    config = model_config_from_args(copy.copy(args))
    if isinstance(config, GPTModelConfig):
        # Megatron does not hand the factor on; a run of ours does, and says so.
        honoured = getattr(args, rope_scaling.HONOURED, False)
        config.rope_scaling_factor = args.rope_scaling_factor if honoured else GPTModelConfig.rope_scaling_factor
    # Every weight is about to be overwritten.
    config.transformer.perform_initialization = False
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_model(groups)
    return model.to(args.params_dtype).eval()


def sharded_state(model: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron saves and loads of ``model``; ``metadata`` says how, as a checkpoint's content metadata do."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})


def sharded_tensors(
    model: Any, metadata: Mapping[str, Any] = CONTENT
) -> tuple[dict[str, Any], Iterator[tuple[str, int | None, Any, tuple[int, ...]]]]:
    """What Megatron saves of ``model``, and each tensor of it.

    Returns:
        the sharded state dictionary, and for each tensor its key in a checkpoint, its layer where layers are stored as
        one tensor, the ``ShardedTensor``, and where it begins in the stored tensor (without the layer).
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = sharded_state(model, metadata)
    # Parts of a gated MLP's first matrix are made from it when it is saved.
    apply_factories(state)

    def tensors() -> Iterator[tuple[str, int | None, Any, tuple[int, ...]]]:
        for value in nested_values(state):
            if isinstance(value, ShardedTensor):
                prepended = value.prepend_axis_num
                layer = value.global_offset[0] if prepended else None
                yield value.key, layer, value, tuple(value.global_offset[prepended:])

    return state, tensors()


def filled(model: Any, source: Any, vocabulary_rows: int, args: Namespace) -> dict[str, Any]:
    """What Megatron saves of ``model``, with the weights of ``source`` in place of the model's.

    Most are views of the files that ``source`` reads; the model's own memory is never touched.

    Args:
        model: as :func:`build` made it.
        source: of the same architecture.
        vocabulary_rows: of the model, padding included.
        args: that it was built of.

    Raises:
        ConvertError: if the model has a tensor that the source says nothing about, or one of another shape.
    """
    state, tensors = sharded_tensors(model)
    assembler = Assembler(source, vocabulary_rows, args)
    for key, layer, saved, offsets in tensors:
        # One rank has all columns.
        found = assembler.tensor(key, layer, offsets[0], len(saved.data))
        if found.shape != saved.data.shape:
            raise ConvertError(f"{source.path}: Megatron's tensor {key} is {saved.data.shape}, not {found.shape}")
        saved.data = found.to(saved.data.dtype)
    assembler.require_all_used()
    return state
