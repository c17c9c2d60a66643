"""Which heads of which tensors go where, and the way back of their gradients.  Pure Python.

A head is ``(tensor, index)``: of tensors ``[s, b, heads, d]``, the index of one and of a head in it.  Mixing makes
outputs of heads of its inputs; its gradient is a sum of heads of the outputs' gradients.  Heads that lie at equal
distances on both sides are one ``Run`` (``pipeline/runs.py``), which is a slice of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from ..pipeline.runs import Run
from .roles import LayerRole, SharedTensor

Head = tuple[int, int]


@dataclass(frozen=True)
class MixingPlan:
    """What each head of each output is.

    Args:
        inputs: how many heads each input has.
        outputs: for each output its heads, in order: which input, and which head of it.
        may_be_views: whether an output may be a view of an input, where its heads lie so.
        together: after the outputs that have memory of their own each, how many of the next ones share a piece of it,
            and of those after them: they are let go of together.
    """

    inputs: tuple[int, ...]
    outputs: tuple[tuple[Head, ...], ...]
    may_be_views: bool = False
    together: tuple[int, ...] = ()

    @cached_property
    def rooms(self) -> tuple[tuple[int, ...], ...]:
        """The outputs, by index, that are allocated together; views are in none."""
        first = len(self.outputs) - sum(self.together)
        ends = [first + sum(self.together[:i]) for i in range(len(self.together) + 1)]
        parts = [range(i, i + 1) for i in range(first)] + [range(a, b) for a, b in pairwise(ends)]
        rooms = [tuple(j for j in part if self.views[j] is None) for part in parts]
        return tuple(room for room in rooms if room)

    @cached_property
    def views(self) -> tuple[Run | None, ...]:
        """For each output the run that it is a view of; ``None`` where it has memory of its own."""
        runs = [_runs((input_, head, j, k) for k, (input_, head) in enumerate(o)) for j, o in enumerate(self.outputs)]
        return tuple(of_one[0] if self.may_be_views and len(of_one) == 1 else None for of_one in runs)

    @cached_property
    def copies(self) -> tuple[Run, ...]:
        """What is copied into the outputs that have memory of their own."""
        targets = [j for j, view in enumerate(self.views) if view is None]
        return _runs((input_, head, j, k) for j in targets for k, (input_, head) in enumerate(self.outputs[j]))

    @cached_property
    def gradient_views(self) -> tuple[Run | None, ...]:
        """For each input the run of one output's gradient that is its own, whole; ``None`` if there is none."""
        return tuple(
            copies[0] if len(copies) == 1 and not sums and self._is_whole(copies[0], heads) else None
            for copies, sums, heads in zip(*self._gradients, self.inputs, strict=True)
        )

    @cached_property
    def gradient_copies(self) -> tuple[Run, ...]:
        """What is copied into the gradients that are no views; zeros where nobody reads a head."""
        return self._of_no_view(self._gradients[0])

    @cached_property
    def gradient_sums(self) -> tuple[Run, ...]:
        """What is then added to them: of heads that several outputs have, all but the first."""
        return self._of_no_view(self._gradients[1])

    def _of_no_view(self, runs: Sequence[Sequence[Run]]) -> tuple[Run, ...]:
        return tuple(
            run for of_one, view in zip(runs, self.gradient_views, strict=True) if view is None for run in of_one
        )

    @staticmethod
    def _is_whole(run: Run, heads: int) -> bool:
        return run.source is not None and (run.target_start, run.target_step, run.count) == (0, 1, heads)

    @cached_property
    def _gradients(self) -> tuple[list[tuple[Run, ...]], list[tuple[Run, ...]]]:
        """For each input what is copied, and what is added."""
        readers = [(j, k, input_, head) for j, o in enumerate(self.outputs) for k, (input_, head) in enumerate(o)]
        copies, sums = [], []
        for i, heads in enumerate(self.inputs):
            mine = [(j, k, i, head) for j, k, input_, head in readers if input_ == i]
            first = {head: (j, k) for j, k, _, head in reversed(mine)}
            unread = [(None, 0, i, head) for head in range(heads) if head not in first]
            copies.append(_runs([each for each in mine if first[each[3]] == each[:2]] + unread))
            sums.append(_runs(each for each in mine if first[each[3]] != each[:2]))
        return copies, sums


def _runs(moves: Iterable[tuple[int | None, int, int, int]]) -> tuple[Run, ...]:
    """Moves ``(source, head, target, head)`` as runs; each move joins the newest of its tensors, if it fits."""
    runs: list[Run] = []
    newest: dict[tuple[int | None, int], int] = {}
    for source, start, target, place in moves:
        at = newest.get((source, target))
        if at is not None and (longer := _longer(runs[at], start, place)) is not None:
            runs[at] = longer
        else:
            newest[source, target] = len(runs)
            runs.append(Run(source, start, 1, target, place, 1, 1))
    return tuple(runs)


def _longer(run: Run, start: int, place: int) -> Run | None:
    """``run`` and one head more, if that lies at the same distance from its last as they from each other."""
    behind = run.count - 1
    source_step = start - run.source_start - run.source_step * behind
    target_step = place - run.target_start - run.target_step * behind
    if behind and (source_step, target_step) != (run.source_step, run.target_step):
        return None
    # Slices go forward; zeros have no heads.
    if target_step < 1 or (run.source is not None and source_step < 1):
        return None
    return replace(run, source_step=source_step, target_step=target_step, count=run.count + 1)


# The plans of a layer.


@dataclass(frozen=True)
class OwnHeads:
    """Where a layer's own heads are, in the tensors that its projection gave: their sizes, and each kind's heads.

    Attributes:
        inputs: how many heads each of the tensors has.
        query: of the queries; none where they are not to be mixed.
        key: of the projected keys, in order of the group.
        value: of the projected values.
    """

    inputs: tuple[int, ...]
    query: tuple[Head, ...]
    key: tuple[Head, ...]
    value: tuple[Head, ...]

    @classmethod
    def in_projection(cls, role: LayerRole, queries: int) -> OwnHeads:
        """In the one tensor of a projection: a group's are ``q.. k v``, without the key or the value that is left out.

        Args:
            role: of the layer.
            queries: how many query heads a group has.
        """
        at = 0
        query: list[Head] = []
        key: list[Head] = []
        value: list[Head] = []
        for group in range(len(role.key.read)):
            query += [(0, at + i) for i in range(queries)]
            at += queries
            for heads, of_kind in zip((key, value), role.both, strict=True):
                if group in of_kind.projected:
                    heads.append((0, at))
                    at += 1
        return cls((at,), tuple(query), tuple(key), tuple(value))

    @classmethod
    def apart(cls, role: LayerRole) -> OwnHeads:
        """Keys and values in a tensor each, which is missing where none is projected; no queries."""
        sizes = [len(of_kind.projected) for of_kind in role.both]
        inputs = tuple(size for size in sizes if size)
        # The values are the last tensor.
        key, value = tuple((0, i) for i in range(sizes[0])), tuple((len(inputs) - 1, i) for i in range(sizes[1]))
        return cls(inputs, (), key, value)


@dataclass(frozen=True)
class LayerPlan:
    """How a layer makes what its attention reads, and what it hands on.

    Attributes:
        mixing: inputs are the layer's own tensors, then the pieces of each of ``role.takes``.  Outputs are the queries
            (where own ones are given), keys and values that attention reads, then the pieces of all that is handed on.
        handed_on: each of ``role.puts``, in the order of the outputs -> in how many pieces it is.
    """

    mixing: MixingPlan
    handed_on: dict[SharedTensor, int]

    @classmethod
    def of(cls, role: LayerRole, own: OwnHeads, taken: Sequence[Sequence[int]], may_be_views: bool = True) -> LayerPlan:
        """The plan of ``role``.

        A layer that reads all of its own K/V hands on views of the projection, which autograd keeps anyway for this
        layer's attention.  One that reads a mixture hands on copies: views would keep the projection alive, which its
        own attention does not.

        Args:
            role: of the layer.
            own: where its own heads are.
            taken: for each of ``role.takes``, how many heads each of its pieces has.
            may_be_views: whether a layer may hand on views at all; what it reads may be emptied after its attention.
        """
        inputs = list(own.inputs)
        found: dict[SharedTensor, list[Head]] = {}
        for shared, sizes in zip(role.takes, taken, strict=True):
            found[shared] = []
            for size in sizes:
                found[shared] += [(len(inputs), i) for i in range(size)]
                inputs.append(size)
        outputs = [own.query] if own.query else []
        for heads, of_kind in zip((own.key, own.value), role.both, strict=True):
            outputs.append(tuple((heads if origin is None else found[origin])[i] for origin, i in of_kind.read))
        handed_on, together = {}, []
        # Keys and values that the same layers read are let go of together.
        for readers in dict.fromkeys(shared.readers for shared in role.puts):
            pieces = []
            for heads, of_kind in zip((own.key, own.value), role.both, strict=True):
                for shared, indices in of_kind.puts.items():
                    if shared.readers == readers:
                        its = _pieces([(heads[i], of_kind.projected[i]) for i in indices])
                        handed_on[shared] = len(its)
                        pieces += its
            outputs += pieces
            together.append(len(pieces))
        may_be_views = may_be_views and not role.takes
        return cls(MixingPlan(tuple(inputs), tuple(outputs), may_be_views, tuple(together)), handed_on)


def _pieces(heads: Sequence[tuple[Head, int]]) -> list[tuple[Head, ...]]:
    """Heads, with their groups, cut so that each piece can be a view, and its gradient one of the reader's."""
    sizes = [run.count for run in _runs((*head, 0, group) for head, group in heads)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [tuple(head for head, _ in heads[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def projection_plan(own: OwnHeads) -> MixingPlan:
    """A projection's queries, keys and values each in memory of their own; those that are not there are left out."""
    return MixingPlan(own.inputs, tuple(heads for heads in (own.query, own.key, own.value) if heads))
