"""Counts what torch dispatches: operations that do work, and the bytes that they write.  Exact, on any machine.

Left out are views, which touch no data, and allocations, which fill none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Views by another name, and allocations.
_NO_WORK = {"_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class OperationCounter(TorchDispatchMode):
    """Within the block, counts operations by name (``operations``) and what they write (``bytes_written``)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes_written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_WORK:
            written = list(_written_arguments(func, args, kwargs or {}))
            tensors = written or [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            # What only answers a question, such as ``is_same_size``, writes nothing.
            if tensors or name == "_local_scalar_dense":
                self.operations[name] += 1
                self.bytes_written += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return result

    @property
    def total(self) -> int:
        return self.operations.total()


def _written_arguments(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Those that the operation changes in place, or is told to write to."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
