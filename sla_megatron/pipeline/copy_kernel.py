"""The kernel that moves heads between tensors on a GPU, in Triton, which torch brings along: one launch for all.

Each program moves some rows (positions of the sequence and samples) of one head.  A table on the device says for each
target head where it is, where it is copied from, and what is added; it is made once for a plan and the tensors'
strides.  Sums are made in fp32.  With ``TRITON_INTERPRET=1`` the kernel runs on the CPU, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .runs import Run

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds have none, nor have some platforms.
    triton = None

#: Tensors (their storages) that one launch can reach.
_ADDRESSES = 16
#: Elements that a program moves.
_BLOCK = 4096


def serves(tensor: Tensor) -> bool:
    """Whether heads of tensors like this one are moved by the kernel."""
    if not tensor.is_cuda or tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if triton is None:
        _say_once()
        return False
    return True


@lru_cache
def _say_once() -> None:
    if os.environ.get("RANK", "0") == "0":
        print("sla-megatron: no Triton here: K/V are mixed by torch's copies, which start more kernels", flush=True)


def move(
    targets: Sequence[Tensor | None], sources: Sequence[Tensor | None], copies: Sequence[Run], sums: Sequence[Run]
) -> bool:
    """As ``copying.move``, in one launch; nothing, and False, where the tensors lie in more storages than it reaches.

    Heads are all of one shape.  The table is found again by the identity of ``copies`` and ``sums``: make them once.
    """
    storages: dict[int, int] = {}
    layout = tuple(tuple(_placed(tensor, storages) for tensor in tensors) for tensors in (targets, sources))
    if len(storages) > _ADDRESSES:
        return False
    some = targets[copies[0].target]
    rows, width = some.shape[0] * some.shape[1], some.shape[3]
    if not some.numel():
        return True
    table, more = _table(_Moves(copies, sums), layout, some.device)
    if some.is_cuda and torch.cuda.is_current_stream_capturing():
        _read_by_graphs.append(table)
    addresses = [*storages, *[next(iter(storages))] * (_ADDRESSES - len(storages))]
    block = triton.next_power_of_2(width)
    block_rows = min(max(1, _BLOCK // block), triton.next_power_of_2(rows))
    placed = [place for side in layout for place in side if place is not None]
    in_order = all(place[-1] == 1 for place in placed)
    steps = [value * some.itemsize for place in placed for value in (*place[1:-1], width)]
    _kernel[(triton.cdiv(rows, block_rows), table.shape[0])](
        table,
        *addresses,
        some.shape[1],
        rows,
        WIDTH=width,
        ELEMENT=getattr(tl, str(some.dtype).removeprefix("torch.")),
        MORE=more,
        ALIGNED=in_order and not any(value % 16 for value in (*steps, *storages)),
        BLOCK_ROWS=block_rows,
        BLOCK=block,
    )
    return True


#: Tables that captured graphs read at every replay, by their addresses: the cache may forget them, memory must not.
_read_by_graphs: list[Tensor] = []


#: Which storage, where in it a tensor begins, and the strides of s, b, heads and d.
_Placed = tuple[int, int, int, int, int, int]


def _placed(tensor: Tensor | None, storages: dict[int, int]) -> _Placed | None:
    if tensor is None:
        return None
    which = storages.setdefault(tensor.untyped_storage().data_ptr(), len(storages))
    return (which, tensor.storage_offset(), *tensor.stride())


@dataclass(frozen=True, eq=False)
class _Moves:
    """Runs, compared by identity: a plan makes each tuple of them once."""

    copies: Sequence[Run]
    sums: Sequence[Run]

    def __hash__(self) -> int:
        return hash((id(self.copies), id(self.sums)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Moves) and self.copies is other.copies and self.sums is other.sums


@lru_cache(maxsize=4096)
def _table(moves: _Moves, layout: tuple[tuple[_Placed | None, ...], ...], device: torch.device) -> tuple[Tensor, int]:
    """For each target head: itself, the head that is copied, and those that are added; how many those are at most.

    ``[target heads, 2 + added, 5]``: storage (-1: zeros), the head's offset in it, strides of s, b and d.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A copy to the device, which CUDA would refuse in words of its own.
        raise RuntimeError(
            "K/V lie in a step that is captured as they lay in no step before: more --cuda-graph-warmup-steps"
        )
    targets, sources = layout
    slots: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for run, is_sum in [*((run, False) for run in moves.copies), *((run, True) for run in moves.sums)]:
        of_source = None if run.source is None else sources[run.source]
        for i in range(run.count):
            place = run.target_start + i * run.target_step
            head = _head(of_source, run.source_start + i * run.source_step)
            if is_sum:
                slots[run.target, place].append(head)
            else:
                slots[run.target, place] = [_head(targets[run.target], place), head]
    longest = max(map(len, slots.values()))
    rows = [heads + [_head(None, 0)] * (longest - len(heads)) for heads in slots.values()]
    return torch.tensor(rows, dtype=torch.int64).to(device), longest - 2


def _head(placed: _Placed | None, head: int) -> tuple[int, ...]:
    if placed is None:
        return (-1, 0, 0, 0, 0)
    which, offset, of_s, of_b, of_head, of_d = placed
    return (which, offset + head * of_head, of_s, of_b, of_d)


if triton is not None:

    @triton.jit
    def _pointers(entry, addresses, s, b, d, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
        """Where the rows ``(s, b)`` of the head are that ``entry`` describes, ``[rows, d]``.

        Aligned ones lie in order of d, and are moved 16 bytes at a time.
        """
        which = tl.load(entry)
        address = addresses[0]
        for i in tl.static_range(1, len(addresses)):
            address = tl.where(which == i, addresses[i], address)
        offset = tl.load(entry + 1) + s * tl.load(entry + 2) + b * tl.load(entry + 3)
        if ALIGNED:
            pointers = address.to(tl.pointer_type(ELEMENT)) + (offset[:, None] + d[None, :])
            pointers = tl.max_contiguous(
                tl.multiple_of(pointers, (1, 16)), (1, 16 // (ELEMENT.primitive_bitwidth // 8))
            )
        else:
            pointers = address.to(tl.pointer_type(ELEMENT)) + (offset[:, None] + d[None, :] * tl.load(entry + 4))
        return pointers

    @triton.jit
    def _load(entry, addresses, row, s, b, d, rows, WIDTH: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
        """The head that ``entry`` describes, or zeros."""
        there = tl.where(tl.load(entry) >= 0, rows, 0)
        inside = (row < there)[:, None] & (d < WIDTH)[None, :]
        return tl.load(_pointers(entry, addresses, s, b, d, ELEMENT, ALIGNED), inside, other=0.0)

    @triton.jit
    def _kernel(
        table, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, batch, rows, WIDTH: tl.constexpr,
        ELEMENT: tl.constexpr, MORE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        addresses = (a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
        row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        s, b, d = row // batch, row % batch, tl.arange(0, BLOCK)
        entry = table + tl.program_id(1) * ((2 + MORE) * 5)
        moved = _load(entry + 5, addresses, row, s, b, d, rows, WIDTH, ELEMENT, ALIGNED)
        if MORE:
            total = moved.to(tl.float32)
            for i in tl.static_range(MORE):
                more = _load(entry + 10 + 5 * i, addresses, row, s, b, d, rows, WIDTH, ELEMENT, ALIGNED)
                total += more.to(tl.float32)
            moved = total.to(ELEMENT)
        inside = (row < rows)[:, None] & (d < WIDTH)[None, :]
        tl.store(_pointers(entry, addresses, s, b, d, ELEMENT, ALIGNED), moved, inside)
