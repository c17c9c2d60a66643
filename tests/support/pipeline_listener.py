"""Hears, on one rank of a pipeline, what crosses the wire, which K/V are alive, and the first step's gradients."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from .trainer_worker import Listener


class PipelineListener(Listener):
    """A :class:`Listener` that also records, for each step of training or evaluation:

    * ``sent``: the shapes of the tensors handed to isend, to the next and to the previous rank, in order;
    * ``received``: the same of irecv;
    * ``live``: bytes of K/V and their gradients that are alive between two passes, the most of the step.  What counts
      is memory, not tensors: a storage is alive as long as anything, an autograd graph for one, refers to it;
    * ``passes``: forward and backward passes, in order.

    The gradients of the first step are written to ``path``, by name with the layer's number in the model.
    """

    def __init__(self, path: Path, gradients: Path) -> None:
        super().__init__(path)
        self._gradients = gradients
        self._storages: dict[int, tuple[Any, int]] = {}
        self.steps: list[dict[str, Any]] = []

    def listen_to(self, training: Any) -> None:
        super().listen_to(training)
        from megatron.core.pipeline_parallel import p2p_communication, schedules

        from sla_megatron.model import recomputation
        from sla_megatron.pipeline import step
        from sla_megatron.pipeline.resident import Resident, ResidentTensors

        self._wrap(schedules, "forward_step", lambda *_: self._after_pass("F"))
        self._wrap(schedules, "backward_step", lambda *_: self._after_pass("B"))
        for function in ("_p2p_ops", "_batched_p2p_ops"):
            self._before(p2p_communication, function, self._on_wire)
        for module in (step, recomputation):
            self._wrap(module, "joined", lambda _, wholes: self._watch(wholes))
        self._wrap(step, "unpack_and_empty", lambda _, unpacked: self._watch(unpacked[1]))
        self._wrap(ResidentTensors, "fetch", lambda _, wholes: self._watch(wholes))
        self._wrap(Resident, "keep", self._on_keep)
        self._wrap(Resident, "deposit", lambda args, _: self._watch(args[0].tensors))
        self._wrap(training, "finalize_model_grads", self._on_gradients)
        self._around_schedules(training)

    def _before(self, owner: Any, name: str, callback: Any) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            callback(args, kwargs)
            return original(*args, **kwargs)

        self._originals.append((owner, name, original))
        setattr(owner, name, wrapper)

    def _around_schedules(self, training: Any) -> None:
        """Number the runs of a schedule, in whichever way the trainer obtains it."""
        original = training.get_forward_backward_func

        def get(*args: Any, **kwargs: Any) -> Any:
            function = original(*args, **kwargs)

            def numbered(**arguments: Any) -> Any:
                self.steps.append(
                    {
                        "forward_only": arguments["forward_only"],
                        "num_microbatches": arguments["num_microbatches"],
                        "sent": {"next": [], "prev": []},
                        "received": {"next": [], "prev": []},
                        "passes": "",
                        "live": 0,
                        "left": 0,
                    }
                )
                result = function(**arguments)
                self.steps[-1]["left"] = self._live_bytes()
                return result

            return numbered

        self._originals.append((training, "get_forward_backward_func", original))
        training.get_forward_backward_func = get

    def _on_wire(self, _: tuple, tensors: dict[str, Any]) -> None:
        for what, which in (("sent", "send"), ("received", "recv")):
            for direction in ("next", "prev"):
                tensor = tensors[f"tensor_{which}_{direction}"]
                if tensor is not None:
                    self.steps[-1][what][direction].append(list(tensor.shape))

    def _on_put(self, args: tuple, result: Any) -> None:
        super()._on_put(args, result)
        # Views of their layer's projection are its own attention's, which keeps that until the backward pass.
        self._watch([one for one in args[2] if one.untyped_storage().nbytes() == one.nbytes])

    def _on_keep(self, args: tuple, _: Any) -> None:
        self._watch(args[0].tensors)
        self._shared += [weakref.ref(tensor) for tensor in args[0].tensors]

    def _watch(self, tensors: Any) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages or self._storages[storage.data_ptr()][0].expired():
                self._storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())

    def _live_bytes(self) -> int:
        self._storages = {key: (ref, size) for key, (ref, size) in self._storages.items() if not ref.expired()}
        return sum(size for _, size in self._storages.values())

    def _after_pass(self, kind: str) -> None:
        self.steps[-1]["passes"] += kind
        self.steps[-1]["live"] = max(self.steps[-1]["live"], self._live_bytes())

    def _on_gradients(self, args: tuple, _: Any) -> None:
        import torch
        from megatron.core import parallel_state
        from megatron.core.utils import get_attr_wrapped_model

        from . import sharding

        if self._gradients.exists() or len([step for step in self.steps if not step["forward_only"]]) > 1:
            return
        found = {}
        for chunk in args[0]:
            layers = get_attr_wrapped_model(chunk, "decoder").layers
            offset = layers[0].layer_number - 1 if len(layers) else 0
            for name, gradient in sharding.gather_gradients(chunk).items():
                found[_global_name(name, offset)] = gradient.clone()
        if parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_data_parallel_rank() == 0:
            torch.save(found, self._gradients)

    def answer(self) -> dict[str, Any]:
        return super().answer() | {"steps": self.steps}


def _global_name(name: str, offset: int) -> str:
    """``decoder.layers.0.mlp...`` on a stage whose first layer is the fifth -> ``decoder.layers.4.mlp...``."""
    before, found, after = name.partition("decoder.layers.")
    if not found:
        return name
    index, rest = after.split(".", 1)
    return f"{before}decoder.layers.{int(index) + offset}.{rest}"
