"""What every rank of the job does in an examination; rank 0 leads (``examination.py``)."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch.distributed import PrefixStore, Store

from ...common.errors import StartError
from ...common.silence import silence
from ...cpu.device import choose_device, megatron_device
from . import checkpoints
from .finding import FAIL, Fault, Finding, as_text, error_line, found
from .host import Host
from .job import job_args
from .meeting import Meeting, connect
from .node_checks import Asked, before_megatron, with_megatron
from .place import Place
from .resources import Ranks
from .watch import Watch


def connection(place: Place, seconds: float) -> Store:
    """A connection to the job's store.  Raises :class:`Fault` where there is none within ``seconds``."""
    try:
        return connect(place, seconds)
    except (RuntimeError, ValueError) as error:
        raise Fault(f"rank {place.rank} on node {place.node} cannot reach rank 0: {error_line(error)}") from error


class Rank:
    """One rank.

    ``doing`` names what it is at; ``args`` are the job's once this rank has read its flags.
    """

    def __init__(self, asked: Asked, place: Place, meeting: Meeting) -> None:
        self.asked, self.place, self.meeting = asked, place, meeting
        self.device = _device_here(asked.device)
        self.doing = "start"
        self.args: Namespace | None = None
        self.measured: list[Finding] = []

    def examine(self) -> int:
        """Follow rank 0; its verdict."""
        self.come()
        # Each of rank 0's steps may take its time limit.
        patience = 4 * self.asked.timeout + 60
        other = Meeting(connection(self.place, self.asked.timeout), self.place.rank, self.place.world_size)
        watch = Watch(lambda: other.await_("verdict", patience))
        nodes = self.meeting.await_("nodes", patience)
        if nodes is not None:
            with ExitStack() as stack:
                if self.place.examines_node:
                    self.meeting.leave("node", as_text(self.examine_node(stack, nodes[self.place.node])))
                    probe = self.meeting.await_("probe", patience)
                    shared = found("shared", checkpoints.sees_probe, probe, self.place.node)
                    self.meeting.leave("shared", as_text([shared]))
                if self.meeting.await_("layout", patience):
                    self.run_layout(stack)
        status = watch.finish()
        self.meeting.leave("left", "")
        return status

    def come(self) -> None:
        """Say that this rank is there, and where."""
        self.meeting.leave("come", json.dumps([self.place.node, self.place.local_rank, Host().affinity()]))

    def examine_node(self, stack: ExitStack, affinities: list[str]) -> list[Finding]:
        """This node's findings; ``stack`` keeps Megatron's device entered.

        ``affinities`` are the cores that each of its ranks may run on, by LOCAL_RANK.
        """
        self.doing = "gpus"
        ranks = Ranks(affinities, self.place.world_size) if self.place.launched else None
        findings = before_megatron(self.asked, self.place, ranks.here if ranks else 0, self.device)
        if any(finding.check == "megatron" and finding.status == FAIL for finding in findings):
            return findings
        try:
            stack.enter_context(_megatron(self.device))
        except Exception as error:
            return [*findings, Finding("upstream", FAIL, error_line(error))]
        more, self.args = with_megatron(
            self._settle, self.device, self.place.rank == 0, ranks, lambda check: setattr(self, "doing", check)
        )
        return [*findings, *more]

    def run_layout(self, stack: ExitStack) -> None:
        """This rank's part of the layout, and of the rates; leaves what came of it, and as the how manieth."""
        layout = found("layout", self._layout, stack)
        findings = [layout, *self.measured]
        order = self.meeting.store.add("layout-order", 1)
        self.meeting.leave("layout-done", json.dumps([order, as_text(findings)]))

    def _layout(self, stack: ExitStack) -> str:
        if self.args is None:
            stack.enter_context(_megatron(self.device))
            self.args = self._settle()
        from .layout import layout

        # A connection beside the others, so that a wait on one does not hold up another.
        groups = PrefixStore("layout-groups", connection(self.place, self.asked.timeout))
        return layout(
            self.args,
            groups,
            self.asked.timeout,
            self.place.launched,
            self._reached,
            self._measure if self.asked.rates else lambda: None,
        )

    def _measure(self) -> None:
        from .rates import measured_rates

        self.measured += measured_rates(self.args, self.place.launched, self._reached)

    def _reached(self, step: str) -> None:
        self.meeting.leave("reached", step)

    def _settle(self) -> Namespace:
        on_cpu = self.device == "cpu" and (self.place.launched or self.asked.device == "cpu")
        return job_args(self.place, self.asked.num_gpus, on_cpu)


def _device_here(requested: str) -> str:
    """Where this process computes: on this machine's GPUs, unless it has none or the job wants none."""
    try:
        return choose_device(requested)
    except StartError:
        # The job wants a GPU and there is none: its flags can be examined still.
        return "cpu"


@contextmanager
def _megatron(device: str) -> Iterator[None]:
    with ExitStack() as stack:
        with silence():
            stack.enter_context(megatron_device(["--device", device]))
        yield
