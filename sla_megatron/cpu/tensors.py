"""Tensors that are asked to live on ``cuda`` live on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _on_cpu(device: Any) -> Any:
    """``device`` with every way of naming a GPU turned into the CPU: ``"cuda:1"``, ``torch.device("cuda")``, ``0``."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int):
        return _CPU
    if isinstance(device, str) and device.startswith("cuda"):
        return _CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


class CudaMeansCpu(TorchFunctionMode):
    """While entered, ``device="cuda"`` arguments, ``.cuda()`` and ``.to("cuda")`` mean the CPU.

    Nothing is pinned.  ``Tensor.type()`` answers as a CUDA tensor would, since Megatron's optimizers sort parameters by
    that string.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _on_cpu(args[1]), *args[2:])
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


_UPSTREAM_APPLY = BackwardCFunction.apply


def backward_on_cpu(self: BackwardCFunction, *args: Any) -> Any:
    """Stands for ``BackwardCFunction.apply``: an autograd function's ``backward``, under :class:`CudaMeansCpu` as well.

    torch leaves a function mode for the length of a call that the mode has seen, and ``torch.autograd.backward``, which
    reentrant recomputation calls, is such a call.
    """
    if torch._C._len_torch_function_stack() > 0:
        return _UPSTREAM_APPLY(self, *args)
    with CudaMeansCpu():
        return _UPSTREAM_APPLY(self, *args)
