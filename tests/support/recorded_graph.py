"""A CUDA graph on the CPU: a step's operations are recorded once, and then run again without any Python between them.

``RecordedGraph`` and ``recording`` stand for ``torch.cuda.CUDAGraph`` and ``torch.cuda.graph``.  As in a graph, what a
replay computes is what the recorded operations compute from what lies in memory: whatever Python did beside them, such
as counting steps, is as it was when they were recorded.  As under capture, what looks at a value on the host, or brings
one from there, raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
#: What needs the host: a value, a shape that depends on values.
HOST = {_aten._local_scalar_dense, _aten.item, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.is_nonzero}
HOST |= {_aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.repeat_interleave}
#: The same, of which torch hears nothing below Python where all tensors are on the CPU; and the way from there.
_TO_HOST = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}
_TO_DEVICE = {torch.Tensor.cuda, torch.Tensor.to}
_EMPTY = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided}


class HostNeeded(RuntimeError):
    """An operation that a CUDA graph cannot hold."""


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storages(value: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(value)}


def _alias(value: Any) -> Any:
    """Tensors as they are now: whoever gives one other memory (``.data``) does not change what was recorded."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)


class _Recorder(TorchDispatchMode):
    """Takes note of all operations but those on what is the host's on a GPU too: generators' states, which are bytes,
    Python's numbers, and what is made of these alone."""

    def __init__(self, operations: list[_Operation]) -> None:
        super().__init__()
        self._operations = operations
        #: By their storages, which are theirs as long as they live.
        self._on_host: dict[int, Tensor] = {}

    def is_on_host(self, tensor: Tensor) -> bool:
        return tensor.dtype == torch.uint8 or tensor.untyped_storage()._cdata in self._on_host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        read = _tensors((args, kwargs))
        if func.overloadpacket is _aten.lift_fresh or (read and all(map(self.is_on_host, read))):
            result = func(*args, **kwargs)
            self._on_host.update((tensor.untyped_storage()._cdata, tensor) for tensor in _tensors(result))
            return result
        if func.overloadpacket in HOST:
            raise HostNeeded(str(func))
        inputs = _alias((args, kwargs))
        result = func(*args, **kwargs)
        made = _alias(_tensors(result))
        is_communication = func.namespace == "c10d"
        is_view = not func._schema.is_mutable and _storages(made) <= _storages(inputs)
        if is_communication or not (is_view or func.overloadpacket in _EMPTY):
            fills = [] if func._schema.is_mutable or is_communication else made
            self._operations.append(_Operation(func, *inputs, fills))
        return result


class _Operation:
    """One of them; ``fills`` is the memory where what it returns belongs."""

    def __init__(self, func: Any, args: Any, kwargs: Any, fills: list[Tensor]) -> None:
        self._call = lambda: func(*args, **kwargs)
        self._fills = fills
        self._touched = _storages((args, kwargs, fills))
        self._communicates = func.namespace == "c10d"

    def __call__(self, pending: dict[int, Any]) -> None:
        """Run it, after the communication whose tensors it touches; what it starts itself goes on behind it."""
        for storage in self._touched & pending.keys():
            pending.pop(storage).wait()
        result = self._call()
        if self._communicates:
            works = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.ScriptObject)]
            pending.update((storage, work) for work in works for storage in self._touched)
            return
        if self._fills:
            for place, tensor in zip(self._fills, _tensors(result), strict=True):
                place.copy_(tensor)


class _NoHost(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        of_host = bool(args) and isinstance(args[0], Tensor) and self._recorder.is_on_host(args[0])
        if of_host if func in _TO_DEVICE else func in _TO_HOST and not of_host:
            raise HostNeeded(str(func))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") not in (None, "cpu"):
            raise HostNeeded(str(func))
        return func(*args, **kwargs)


class RecordedGraph:
    """Stands for ``torch.cuda.CUDAGraph``.

    Attributes:
        waits: how often the GPU was waited for while it was recorded, of which nothing is left on a CPU.
    """

    def __init__(self) -> None:
        self.operations: list[_Operation] = []
        self.replays = self.waits = 0

    def wait(self, *_: Any) -> None:
        """Stands for ``torch.cuda.synchronize``."""
        self.waits += 1

    def register_generator_state(self, state: Any) -> None:
        """Nothing that draws random numbers is recorded in these tests."""

    @torch.no_grad()
    def replay(self) -> None:
        """Run what was recorded; not the first time, since recording ran it, where a capture would not."""
        self.replays += 1
        if self.replays == 1:
            return
        pending: dict[int, Any] = {}
        for operation in self.operations:
            operation(pending)
        for work in pending.values():
            work.wait()


@contextmanager
def recording(graph: RecordedGraph, **_: Any) -> Iterator[None]:
    """Stands for ``torch.cuda.graph``."""
    recorder = _Recorder(graph.operations)
    with ExitStack() as stack:
        stack.callback(setattr, torch.cuda, "synchronize", torch.cuda.synchronize)
        torch.cuda.synchronize = graph.wait
        stack.enter_context(recorder)
        stack.enter_context(_NoHost(recorder))
        yield


@contextmanager
def steps_as_graphs(training: Any, warmup_steps: int = 1) -> Iterator[list[RecordedGraph]]:
    """Upstream's own wrapper around the schedules that Megatron's trainer asks for; its graphs are the ones above."""
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader

    graphs: list[RecordedGraph] = []

    def new_graph() -> RecordedGraph:
        graphs.append(RecordedGraph())
        return graphs[-1]

    schedules = training.get_forward_backward_func
    stand_ins = [
        (torch.cuda, "CUDAGraph", new_graph),
        (torch.cuda, "graph", recording),
        (torch.cuda, "graph_pool_handle", lambda: None),
        (training, "get_forward_backward_func", lambda **asked: FullCudaGraphWrapper(schedules(**asked), warmup_steps)),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, stand_in)
        stack.callback(FullCudaGraphWrapper(None).reset_cuda_graph)
        stack.callback(StaticBufferLoader.static_buffers.update, training=[], validation=[])
        yield graphs
