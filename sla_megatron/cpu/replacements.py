"""The complete list of what the CPU backend replaces.  Leaving the backend undoes all of it.

Beside these names, variables (``backend.py``) and one warning it enters
:class:`~sla_megatron.cpu.tensors.CudaMeansCpu`, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

from ..upstream.seams import Seam
from . import cuda_api, experts, optimizer
from .norm import torch_norm
from .tensors import backward_on_cpu

_ONE_DEVICE = "Megatron asks for a CUDA device and initialises model parallelism only where there is one"
_NO_STREAMS = "no streams on the CPU"
_GENERATOR = "the CPU's generator stands for the GPU's"
_MEMORY = "memory figures are logged and reported"
_NO_EFFECT = "acts on the GPU alone"
_EQUAL_SIZES = "gloo gathers and reduces tensors of one size, and experts' ranks hold different numbers of tokens"

#: Logger and warning that is always true, and harmless, where one generator serves both.
SILENCED = ("megatron.core.tensor_parallel.random", "CPU RNG state changed within GPU RNG context")


def _cuda(names: str, stand_in: Callable, reason: str) -> list[Seam]:
    return [Seam(f"torch.cuda:{name}", reason, stand_in=_distinct(stand_in)) for name in names.split()]


def _distinct(stand_in: Callable) -> Callable:
    """A function of its own for each name: torch._dynamo refuses to see one object under two names."""
    if isinstance(stand_in, type):
        return stand_in
    return lambda *args, **kwargs: stand_in(*args, **kwargs)


def replacements() -> list[Seam]:
    """Every replaced name, with the reason."""
    return [*_of_torch(), *_of_megatron()]


def _of_torch() -> list[Seam]:
    return [
        *_cuda("is_available is_initialized", lambda: True, _ONE_DEVICE),
        *_cuda("device_count", lambda: 1, _ONE_DEVICE),
        *_cuda("current_device", lambda: cuda_api.DEVICE_INDEX, _ONE_DEVICE),
        *_cuda("get_device_properties", cuda_api.get_device_properties, _ONE_DEVICE),
        *_cuda("get_device_capability", cuda_api.get_device_capability, _ONE_DEVICE),
        *_cuda("get_device_name", lambda device=None: "cpu", _ONE_DEVICE),
        *_cuda("set_device synchronize empty_cache init ipc_collect", cuda_api.nothing, _NO_EFFECT),
        *_cuda("reset_peak_memory_stats reset_max_memory_allocated set_stream", cuda_api.nothing, _NO_EFFECT),
        *_cuda("Stream", cuda_api.Stream, _NO_STREAMS),
        *_cuda("Event", cuda_api.Event, _NO_STREAMS),
        *_cuda("current_stream default_stream", cuda_api.current_stream, _NO_STREAMS),
        *_cuda("stream", cuda_api.stream, _NO_STREAMS),
        *_cuda("device", cuda_api.device, _NO_STREAMS),
        *_cuda("is_current_stream_capturing", lambda: False, _NO_STREAMS),
        *_cuda("memory_allocated memory_reserved device_memory_used", cuda_api.zero, _MEMORY),
        *_cuda("max_memory_allocated max_memory_reserved", cuda_api.zero, _MEMORY),
        # torch checks the stream's type before a function mode sees the call.
        Seam("torch:Tensor.record_stream", _NO_STREAMS, stand_in=lambda self, stream: None),
        *_cuda("memory_stats", lambda device=None: {}, _MEMORY),
        *_cuda("get_rng_state", cuda_api.get_rng_state, _GENERATOR),
        *_cuda("set_rng_state", cuda_api.set_rng_state, _GENERATOR),
        Seam("torch.cuda.random:get_rng_state", _GENERATOR, stand_in=_distinct(cuda_api.get_rng_state)),
        Seam("torch.cuda.random:set_rng_state", _GENERATOR, stand_in=_distinct(cuda_api.set_rng_state)),
        *_cuda("manual_seed", cuda_api.manual_seed, _GENERATOR),
        *_cuda("manual_seed_all", cuda_api.nothing, "torch.manual_seed calls it after seeding the CPU's generator"),
        Seam(
            "torch.accelerator:is_available",
            "tells torch's own code that there is no accelerator",
            stand_in=lambda: False,
        ),
        Seam(
            "torch._dynamo.config:disable",
            "Megatron compiles small functions; on the CPU that costs minutes",
            stand_in=True,
        ),
        Seam(
            "torch.autograd.function:BackwardCFunction.apply",
            "torch leaves CudaMeansCpu inside torch.autograd.backward, where Megatron's backward functions allocate",
            ("self", "args"),
            stand_in=backward_on_cpu,
        ),
        Seam(
            "torch.utils.data:DataLoader",
            "pinned memory needs a GPU, and a draw on one tensor-parallel rank alone would part their generators",
            stand_in=cuda_api.UnpinnedDataLoader,
        ),
    ]


def _of_megatron() -> list[Seam]:
    return [
        Seam(
            "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
            _GENERATOR,
            ("device", "clone", "graph_safe"),
            stand_in=cuda_api.megatron_get_rng_state,
        ),
        Seam(
            "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
            _GENERATOR,
            ("new_state", "device", "graph_safe"),
            stand_in=cuda_api.megatron_set_rng_state,
        ),
        Seam(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_state_dict",
            "with torch's Adam upstream cannot load a checkpoint into a fresh distributed optimizer",
            ("self", "model_sharded_state_dict", "is_loading", "sharding_type", "metadata"),
            stand_in=optimizer.sharded_state_dict,
        ),
        Seam(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
            "with torch's Adam upstream loads one step count that all parameters share and each advances",
            ("self", "state_dict"),
            stand_in=optimizer.load_state_dict,
        ),
        Seam(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
            "with torch's Adam upstream looks for a step count that the fully reshardable format does not hold",
            ("self", "model_param", "tensors"),
            stand_in=optimizer.set_main_param_and_optimizer_states,
        ),
        Seam(
            "megatron.core.distributed.torch_fully_sharded_data_parallel:DeviceMesh",
            "with --use-torch-fsdp2 Megatron asks, by name, for a mesh of CUDA devices",
            stand_in=cuda_api.DeviceMeshOfCpus,
        ),
        Seam(
            "megatron.training.training:set_jit_fusion_options",
            "it warms up kernels on random tensors, drawn here from the generator that initialises the weights, which "
            "would then depend on the tensor-parallel size",
            ("tp_size",),
            stand_in=cuda_api.skip_warm_up,
        ),
        Seam(
            "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
            "torch's norms in the local spec refuse sequence parallelism",
            ("cls", "config", "hidden_size", "eps", "persist_layer_norm", "zero_centered_gamma", "normalization"),
            stand_in=torch_norm,
        ),
        *_of_experts(),
    ]


def _of_experts() -> list[Seam]:
    return [
        Seam(
            "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
            "it makes lists of sizes of tensors on a GPU alone, and torch's all-to-all takes no tensors for sizes",
            ("tensor", "as_numpy", "record_stream"),
            stand_in=experts.already_on_cpu,
        ),
        Seam(
            "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
            _EQUAL_SIZES,
            ("input_", "group", "output_split_sizes", "use_global_buffer"),
            stand_in=experts.gather_along_first_dim,
        ),
        Seam(
            "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim",
            _EQUAL_SIZES,
            ("input_", "group", "input_split_sizes", "use_global_buffer"),
            stand_in=experts.reduce_scatter_along_first_dim,
        ),
    ]
