"""The checks that each node makes for itself, in their order."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import checkpoints, data_files, gpus, job, resources, software, upstream, versions
from .finding import FAIL, SKIP, WARN, Finding, found
from .host import Host
from .place import Place

#: A finding under this name is flags for ``sla-plan``, and a line of its own.
FLAGS = "sla-plan"


@dataclass(frozen=True)
class Asked:
    """The flags that ``sla-doctor`` reads itself.

    Attributes:
        device: ``--device``.
        num_gpus: ``--num-gpus``.
        quick: ``--quick``.
        timeout: ``--timeout``, seconds.
        bad_nodes: ``--bad-nodes``.
        rates: ``--rates``.
    """

    device: str
    num_gpus: int | None
    quick: bool
    timeout: float
    bad_nodes: str | None
    rates: bool = False


def before_megatron(asked: Asked, place: Place, ranks_here: int, device: str) -> list[Finding]:
    """What needs no Megatron; ``device`` is this node's, ``ranks_here`` how many ranks of the job it has."""
    return [
        found("python", versions.python_version),
        found("torch", versions.torch_versions, device),
        found("megatron", upstream.megatron_release),
        found("packages", software.packages),
        found("tools", software.tools, device),
        found("gpus", gpus.gpus, asked.device, ranks_here, None, place.launched),
    ]


def with_megatron(
    settle: Callable[[], Namespace],
    device: str,
    is_first_node: bool,
    ranks: resources.Ranks | None = None,
    note: Callable[[str], None] = lambda check: None,
) -> tuple[list[Finding], Namespace | None]:
    """What needs Megatron, on ``device``; and the job's arguments where its flags are accepted.

    Args:
        settle: parses and validates the flags.
        ranks: those of this node; ``None`` where the job need not run on it.
        note: hears the name of each check before it starts.
    """
    findings: list[Finding] = []
    known: dict[str, Any] = {}

    def check(name: str, examine: Callable[..., str], *arguments: Any) -> None:
        note(name)
        findings.append(found(name, examine, *arguments))

    def flags() -> str:
        known["args"] = settle()
        return job.sizes(known["args"])

    def tokenizer(args: Namespace) -> str:
        known["vocabulary"] = data_files.vocabulary_size(args)
        return f"{args.tokenizer_type}, {known['vocabulary']} tokens"

    check("upstream", upstream.upstream_names)
    check("flags", flags)
    args = known.get("args")
    if args is None:
        return findings, None
    check("te", versions.transformer_engine, args, device)
    check("apex", versions.apex, args, device)
    check("tokenizer", tokenizer, args)
    check("data", data_files.data_files, args, known.get("vocabulary"))
    check("cache", data_files.cache_folder, args, is_first_node)
    check("save", checkpoints.save_folder, args)
    check("space", checkpoints.space, args, known.get("vocabulary"))
    check("load", checkpoints.load_folder, args)
    if ranks is not None:
        note("resources")
        findings += _resources(args, known.get("vocabulary"), ranks, device == "cpu", Host())
    return findings, args


def _resources(
    args: Namespace, vocabulary: int | None, ranks: resources.Ranks, on_cpu: bool, host: Host
) -> list[Finding]:
    """What the node gives its ranks; what cannot be read is a doubt as well, and excludes no node."""
    findings = [
        found("cores", resources.cores, ranks, host),
        found("memory", resources.memory, args, vocabulary, ranks, on_cpu, host),
        found("numa", resources.numa, ranks, host, resources.nvidia_topology),
        found("shm", resources.shared_memory, args, ranks, on_cpu, host.shared_memory),
        found("files", resources.open_files, ranks, host),
        found("memlock", resources.locked_memory, host),
    ]
    return [replace(each, status=WARN) if each.status == FAIL else each for each in findings]


def layout_may_run(findings: list[Finding]) -> bool:
    """Whether what the layout needs is there: nothing failed but files and folders."""
    needed = ("python", "torch", "megatron", "gpus", "upstream", "flags", "te", "apex")
    return not any(finding.check in needed and finding.status == FAIL for finding in findings)


def not_run(check: str, reason: str) -> Finding:
    """``check`` was left out."""
    return Finding(check, SKIP, reason)
