"""The whole examination, in one process or in all of the job's ranks.

All ranks come; the first rank of each node examines it; one file shows whether all nodes see the same file system; all
ranks run the layout.  Rank 0 prints a line as soon as all nodes' findings for it are there, and says how it ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ...common.waiting import waiting_for
from . import checkpoints
from .finding import FAIL, OK, Doubt, Fault, Finding, Skipped, found, from_text
from .folders import nearest_existing, probe_file
from .meeting import Meeting, ranks_text
from .node_checks import FLAGS, Asked, layout_may_run, not_run
from .place import Place, slurm_nodes
from .rank import Rank, connection
from .report import Line, Report, merge
from .watch import Watch

#: Seconds that the other ranks have, after one failed in the layout, to fail too.
_AFTERMATH = 2.0
#: Seconds that rank 0 waits for the others to have heard its verdict, which they hear from its process.
_PARTING = 5.0


def examine(asked: Asked, place: Place) -> int:
    """Run everything; the exit status, the same on all ranks.

    Raises:
        Fault: if the ranks cannot meet.
    """
    # torch is imported for it.
    with waiting_for("sla-doctor", "meeting the other ranks", quick=True) if place.rank == 0 else nullcontext():
        meeting = Meeting(connection(place, asked.timeout), place.rank, place.world_size)
    return (Lead if place.rank == 0 else Rank)(asked, place, meeting).examine()


class Lead(Rank):
    """Rank 0: hears the others, prints, and decides."""

    def __init__(self, asked: Asked, place: Place, meeting: Meeting, end: Callable[[int], None] = os._exit) -> None:
        super().__init__(asked, place, meeting)
        self.report = Report()
        self.node_of: dict[int, str] = {}
        #: node -> the cores of each of its ranks, by LOCAL_RANK.
        self.affinities: dict[str, list[str]] = {}
        self.examiners: list[int] = []
        self._end = end

    def examine(self) -> int:
        """Lead the examination; its verdict, which all ranks have heard on return."""
        self.come()
        if not self._all_come():
            self.meeting.publish("nodes", None)
            return self._part(self._conclude())
        self.meeting.publish("nodes", self.affinities)
        with ExitStack() as stack:
            with self._deadline(), waiting_for("sla-doctor", "examining this node", quick=True):
                mine = self.examine_node(stack, self.affinities[self.place.node])
            self._hear_nodes(mine)
            self._share_folder()
            may_run = self._layout_may_run()
            self.meeting.publish("layout", may_run)
            if not may_run:
                return self._part(self._conclude())
            listening = Meeting(self._second_connection(), 0, self.place.world_size)
            watch = Watch(lambda: self._conclude_layout(listening), end=self._end)
            self.run_layout(stack)
            return self._part(watch.finish())

    def _all_come(self) -> bool:
        """Whether all ranks are there; who is where."""
        come = self.meeting.gather("come", range(self.place.world_size), self.asked.timeout, _say)
        told = {rank: json.loads(text) for rank, text in come.items()}
        self.node_of = {rank: node for rank, (node, *_) in told.items()}
        self.examiners = [rank for rank, (_, local_rank, _) in told.items() if local_rank == 0 and rank]
        for node, _, cores in sorted(told.values(), key=lambda each: each[1]):
            self.affinities.setdefault(node, []).append(cores)
        if self.place.launched:
            silent = self._silent_nodes()
            self.report.add(Line(found("ranks", self._ranks, told, silent), tuple(silent)))
        return not self.report.failed()

    def _silent_nodes(self) -> list[str]:
        """The nodes of this Slurm job from which no rank came, where ranks are missing."""
        if len(self.node_of) == self.place.world_size:
            return []
        came = set(self.node_of.values())
        return [node for node in slurm_nodes() if node not in came]

    def _ranks(self, told: dict[int, list[Any]], silent: list[str]) -> str:
        nodes = list(dict.fromkeys(self.node_of.values()))
        missing = set(range(self.place.world_size)) - set(self.node_of)
        if missing:
            came = ", ".join(nodes[:8]) + (", ..." if len(nodes) > 8 else "")
            none = f", none on {', '.join(silent)}" if silent else ""
            raise Fault(
                f"{ranks_text(missing)} of {self.place.world_size} did not come within {self.asked.timeout:.0f} s: "
                f"expected all ranks of the job; there are {len(self.node_of)}, on {came}{none}"
            )
        (node, local_rank), most = Counter((node, local) for node, local, _ in told.values()).most_common(1)[0]
        if most > 1:
            raise Doubt(f"{most} ranks on node {node} have the LOCAL_RANK {local_rank}, and so the same GPU")
        return f"{self.place.world_size} on {len(nodes)} node{'s' if len(nodes) > 1 else ''}"

    def _hear_nodes(self, mine: list[Finding]) -> None:
        """The lines of all checks that nodes make for themselves."""
        heard = self.meeting.gather("node", self.examiners, self.asked.timeout, _say)
        by_check: dict[str, dict[str, Finding]] = {}
        for node, findings in [(self.place.node, mine), *self._by_node(heard)]:
            for finding in findings:
                by_check.setdefault(finding.check, {})[node] = finding
        for findings in by_check.values():
            self.report.add(merge(findings))
        self._require_all_heard(heard)

    def _by_node(self, heard: dict[int, str]) -> Iterator[tuple[str, list[Finding]]]:
        for rank in sorted(heard):
            yield self.node_of[rank], from_text(heard[rank])

    def _require_all_heard(self, heard: dict[int, str]) -> None:
        silent = [self.node_of[rank] for rank in self.examiners if rank not in heard]
        if silent:
            text = f"no report from {', '.join(silent)} within {self.asked.timeout:.0f} s"
            self.report.add(Line(Finding("nodes", FAIL, text), tuple(silent)))

    def _share_folder(self) -> None:
        """Whether a file that is made here is seen on all nodes; nothing is left behind."""
        with self._probe() as probe:
            self.meeting.publish("probe", probe)
            if not self.examiners:
                return
            mine = found("shared", checkpoints.sees_probe, probe, self.place.node)
            heard = self.meeting.gather("shared", self.examiners, self.asked.timeout, _say)
        findings = {self.place.node: mine} | {node: each[0] for node, each in self._by_node(heard)}
        self.report.add(merge(findings))
        self._require_all_heard(heard)

    @contextmanager
    def _probe(self) -> Iterator[dict[str, str] | None]:
        save = getattr(self.args, "save", None)
        writable = any(line.finding.check == "save" and line.finding.status == OK for line in self.report.lines)
        if not self.examiners or save is None or not writable:
            yield None
            return
        token = uuid.uuid4().hex
        with probe_file(nearest_existing(Path(save)), token) as path:
            yield {"path": str(path), "token": token, "node": self.place.node}

    def _layout_may_run(self) -> bool:
        if self.asked.quick:
            self.report.add(Line(not_run("layout", "--quick")))
            return False
        if self.args is None or not layout_may_run([line.finding for line in self.report.lines]):
            self.report.add(Line(not_run("layout", "not run: a check before it failed")))
            return False
        return True

    def _conclude_layout(self, meeting: Meeting) -> int:
        """In the watching thread: hear all ranks, or those that answer in time, and conclude."""
        first_fault: list[float] = []

        def enough(answers: dict[int, str]) -> bool:
            if any(_failed(_findings_of(answer)[1]) for answer in answers.values()):
                first_fault.append(time.monotonic())
            return bool(first_fault) and time.monotonic() - first_fault[0] > _AFTERMATH

        heard = meeting.gather("layout-done", range(self.place.world_size), self.asked.timeout, _say, enough)
        answers = {rank: _findings_of(text) for rank, text in heard.items()}
        failed = any(_failed(findings) for _, findings in answers.values())
        hanging = [] if failed else [rank for rank in range(self.place.world_size) if rank not in heard]
        for check in ("layout", "rates"):
            its = {
                rank: (order, finding)
                for rank, (order, findings) in answers.items()
                for finding in findings
                if finding.check == check
            }
            # Of ranks that hang the first line says all.
            if check == "layout" or its and not hanging:
                self.report.add(Line(found(check, self._layout_text, meeting, its, hanging)))
        flags = [each for _, findings in answers.values() for each in findings if each.check == FLAGS]
        if flags and not self.report.failed():
            self.report.add_plain(flags[0].text)
        return self._conclude(meeting)

    def _layout_text(self, meeting: Meeting, findings: dict[int, tuple[int, Finding]], hanging: list[int]) -> str:
        """What all ranks found; the one that failed first is the one to name, or those that hang."""
        failed = sorted((order, rank) for rank, (order, each) in findings.items() if each.status == FAIL)
        if failed:
            rank = failed[0][1]
            where = f"rank {rank} on node {self.node_of[rank]}: " if self.place.launched else ""
            raise Fault(f"{where}{findings[rank][1].text}")
        if hanging:
            reached = meeting.gather("reached", hanging, 0)
            steps: dict[str, list[int]] = {}
            for rank in hanging:
                steps.setdefault(reached.get(rank) or "start", []).append(rank)
            at = "; ".join(f"{ranks_text(ranks)} at {step}" for step, ranks in steps.items())
            raise Fault(f"not finished within {self.asked.timeout:.0f} s: {at}")
        # The last stage says the loss.
        texts = [each for _, each in findings.values()]
        if texts[0].status != OK:
            raise Skipped(texts[0].text)
        return next((each.text for each in reversed(texts) if "loss" in each.text), texts[0].text)

    def _conclude(self, meeting: Meeting | None = None) -> int:
        """Say how it ended, to the user and to all ranks."""
        status = self.report.conclude(self.asked.bad_nodes)
        (meeting or self.meeting).publish("verdict", status)
        return status

    def _part(self, status: int) -> int:
        """Wait until those that came have heard."""
        self.meeting.gather("left", [rank for rank in self.node_of if rank], _PARTING)
        return status

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        """A file system that does not answer would hang rank 0 itself: say so, and end."""

        def late() -> None:
            text = f"{self.place.node} is still at {self.doing} after {self.asked.timeout:.0f} s"
            self.report.add(Line(Finding("nodes", FAIL, text), (self.place.node,)))
            self._end(self._conclude(Meeting(self._second_connection(), 0, self.place.world_size)))

        timer = threading.Timer(self.asked.timeout, late)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _second_connection(self):
        # A process alone has one store, in its own memory.
        return connection(self.place, self.asked.timeout) if self.place.launched else self.meeting.store


def _findings_of(text: str) -> tuple[int, list[Finding]]:
    order, findings = json.loads(text)
    return order, from_text(findings)


def _failed(findings: list[Finding]) -> bool:
    return any(finding.status == FAIL for finding in findings)


def _say(line: str) -> None:
    print(f"sla-doctor: {line}", file=sys.stderr, flush=True)
