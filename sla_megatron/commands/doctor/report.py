"""What rank 0 makes of the nodes' findings: one line for each check, the first fault, and the nodes to blame."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from ...common.files import write_whole
from .finding import FAIL, OK, SKIP, WARN, Finding

#: Checks whose findings must be the same on all nodes.
MUST_AGREE = ("python", "torch", "megatron", "upstream", "flags", "te", "apex", "tokenizer")

#: Checks that are each node's own even where all nodes fail; another that fails everywhere is the job's fault.
NODES_OWN = ("gpus",)


@dataclass(frozen=True)
class Line:
    """One line of the report, and the nodes that are to blame for it."""

    finding: Finding
    bad_nodes: tuple[str, ...] = ()


def merge(findings: Mapping[str, Finding]) -> Line:
    """The nodes' findings of one check, by node, as one line."""
    check = next(iter(findings.values())).check
    by_status = {
        status: [node for node, finding in findings.items() if finding.status == status]
        for status in (OK, SKIP, WARN, FAIL)
    }
    if by_status[FAIL]:
        return _failed(check, findings, by_status[FAIL])
    if check == "gpus" and by_status[SKIP] and (by_status[OK] or by_status[WARN]):
        return _failed(check, findings, by_status[SKIP])
    if check in MUST_AGREE and len(set(findings.values())) > 1:
        return _differing(check, findings)
    for status in (WARN, OK, SKIP):
        if nodes := by_status[status]:
            text = findings[nodes[0]].text
            if status == WARN:
                text = _named(findings, nodes)
            return Line(Finding(check, status, text))
    raise ValueError(f"no findings of {check}")


def _failed(check: str, findings: Mapping[str, Finding], nodes: Sequence[str]) -> Line:
    own = check in NODES_OWN or len(nodes) < len(findings)
    return Line(Finding(check, FAIL, _named(findings, nodes)), tuple(nodes) if own else ())


def _differing(check: str, findings: Mapping[str, Finding]) -> Line:
    """The nodes that differ from most; with no majority all are named and none is to blame."""
    (usual, most), *_ = Counter(finding.text for finding in findings.values()).most_common()
    odd = [node for node, finding in findings.items() if finding.text != usual]
    blamed = odd if most > len(odd) else []
    text = f"{_named(findings, odd)}: expected the same on all nodes, as {usual!r} on the {most} other"
    return Line(Finding(check, FAIL, text + ("s" if most > 1 else "")), tuple(blamed))


def _named(findings: Mapping[str, Finding], nodes: Sequence[str]) -> str:
    """What ``nodes`` found; each text once, with the nodes that found it, unless there is one node in all."""
    if len(findings) == 1:
        return findings[nodes[0]].text
    by_text: dict[str, list[str]] = {}
    for node in nodes:
        by_text.setdefault(findings[node].text, []).append(node)
    return "; ".join(f"node{'s' * (len(names) > 1)} {', '.join(names)}: {text}" for text, names in by_text.items())


@dataclass
class Report:
    """The lines so far.  Each is written as soon as it is known.

    ``stream`` is taken when the report begins: the main thread silences Megatron by redirecting ``sys.stdout``.
    """

    stream: TextIO = field(default_factory=lambda: sys.stdout)
    lines: list[Line] = field(default_factory=list)

    def add(self, line: Line) -> None:
        self.lines.append(line)
        finding = line.finding
        print(f"{finding.status:<5} {finding.check:<10} {finding.text}", file=self.stream, flush=True)

    def add_plain(self, text: str) -> None:
        """A line that is no finding's, as it is."""
        print(text, file=self.stream, flush=True)

    def failed(self) -> bool:
        return self.first_fault() is not None

    def first_fault(self) -> Finding | None:
        """The first line that failed, in the order of the checks."""
        return next((line.finding for line in self.lines if line.finding.status == FAIL), None)

    def bad_nodes(self) -> list[str]:
        """All nodes that are to blame for a line, once each."""
        return list(dict.fromkeys(node for line in self.lines for node in line.bad_nodes))

    def conclude(self, bad_nodes_file: str | None) -> int:
        """Write the file if one is asked for and name the first fault on stderr; the exit status."""
        if bad_nodes_file is not None:
            write_whole(Path(bad_nodes_file), "".join(f"{node}\n" for node in self.bad_nodes()))
        fault = self.first_fault()
        if fault is None:
            return 0
        print(f"sla-doctor: error: first fault: {fault.check}: {fault.text}", file=sys.stderr, flush=True)
        return 1
