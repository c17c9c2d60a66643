"""What a pipeline step does on one rank, heard from outside: bytes handed to isend, host synchronisations, live K/V."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: What makes the host wait for a GPU.
SYNCHRONISATIONS = (
    "torch.cuda:synchronize",
    "torch.cuda:Event.synchronize",
    "torch.cuda:Stream.synchronize",
    "torch:Tensor.item",
    "torch:Tensor.tolist",
    "torch:Tensor.cpu",
)


class Heard:
    """What one step did on this rank.

    Attributes:
        synchronisations: calls of :data:`SYNCHRONISATIONS`.
        sent: bytes of each tensor handed to isend, to the ``next`` and to the ``prev`` rank, in order.
    """

    def __init__(self) -> None:
        self.synchronisations = 0
        self.sent: dict[str, list[int]] = {"next": [], "prev": []}

    @property
    def sent_bytes(self) -> int:
        """Of the whole step."""
        return sum(map(sum, self.sent.values()))


@contextmanager
def heard() -> Iterator[Heard]:
    """Within the block, synchronisations and what is sent are noted."""
    import torch
    from megatron.core.pipeline_parallel import p2p_communication

    found = Heard()

    def note_wait(*_: Any, **__: Any) -> None:
        found.synchronisations += 1

    def note_sent(*_: Any, **tensors: Any) -> None:
        for direction, sizes in found.sent.items():
            tensor = tensors[f"tensor_send_{direction}"]
            if tensor is not None:
                sizes.append(tensor.numel() * tensor.element_size())

    with _wrapped() as wrap:
        for target in SYNCHRONISATIONS:
            owner: Any = torch.cuda if target.startswith("torch.cuda") else torch
            *path, name = target.partition(":")[2].split(".")
            for part in path:
                owner = getattr(owner, part)
            wrap(owner, name, before=note_wait)
        for name in ("_p2p_ops", "_batched_p2p_ops"):
            wrap(p2p_communication, name, before=note_sent)
        yield found


class LiveKV:
    """Skip-layer K/V, and their gradients, that wait on this rank for another stage.

    Attributes:
        peak: the most bytes of memory that they held between two passes.  What counts is storages, not tensors: one is
            alive as long as anything refers to it.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._storages: dict[int, tuple[Any, int]] = {}

    def watch(self, tensors: Any) -> None:
        """From now on the memory of ``tensors`` counts, each once."""
        from torch.multiprocessing.reductions import StorageWeakRef

        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._storages.get(storage.data_ptr())
            if known is None or known[0].expired():
                self._storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())

    def after_pass(self) -> None:
        """Note what is alive."""
        self._storages = {key: (ref, size) for key, (ref, size) in self._storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))


@contextmanager
def live_kv() -> Iterator[LiveKV]:
    """Within the block, one step, K/V that become resident and gradients deposited for them are watched."""
    from megatron.core.pipeline_parallel import schedules

    from sla_megatron.pipeline.resident import Resident

    found = LiveKV()
    with _wrapped() as wrap:
        for name in ("forward_step", "backward_step"):
            wrap(schedules, name, after=lambda *_, **__: found.after_pass())
        wrap(Resident, "keep", after=lambda resident, *_: found.watch(resident.tensors))
        wrap(Resident, "deposit", after=lambda resident, *_: found.watch(resident.tensors))
        yield found


@contextmanager
def _wrapped() -> Iterator[Callable[..., None]]:
    """Gives a function that has ``before`` or ``after`` called, with the arguments, at each call of ``owner.name``."""
    originals: list[tuple[Any, str, Any]] = []

    def wrap(
        owner: Any, name: str, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
    ) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            result = original(*args, **kwargs)
            if after is not None:
                after(*args, **kwargs)
            return result

        originals.append((owner, name, original))
        setattr(owner, name, wrapper)

    try:
        yield wrap
    finally:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)
