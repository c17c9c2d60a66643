"""What else a pipelined run may be asked for: recomputation, other schedules and batches, optimizers, precision."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.support.pipelines import MODELS, TWO_RANKS, Layout
from tests.support.runs import argv, figures, train_on_all_ranks

pytestmark = pytest.mark.distributed

STEPS = 3
# As in test_pipeline.py: rounding in sums of another order.
CLOSE = 1e-6

MODEL = MODELS["gqa-full-long-and-short"]
FULL = {"recompute_granularity": "full"}
#: Steps of 4, then 8 and 16 samples of 16 tokens each.  Megatron counts such a run in samples.
GROWING = {"step_batch_size_schedule": "0:4 64:8 192:16", "global_batch_size": None, "eval_global_batch_size": 8}
GROWING |= {"train_samples": 36, "lr_decay_samples": 100, "lr_warmup_samples": 4}
GROWING |= {"train_iters": None, "lr_decay_iters": None, "lr_warmup_iters": None}
MOE = {"num_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}

#: Several in a sample, in which none sees another; Megatron's end-of-document tokens are not looked at.
CONVERSATIONS = {"sft": True, "mock_data": None, "core_attention": "sdpa", "tokenizer_type": "SFTTokenizer"}
CONVERSATIONS |= {"sft_tokenizer_prompt_format": "identity", "vocab_size": None, "split": "8,1,1"}

#: Name -> flags that change what is computed; each runs without a pipeline, as 1F1B and interleaved.
COMPARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "more-microbatches-in-evaluation": {"eval_global_batch_size": 16, "eval_micro_batch_size": 1},
    "skipped-step": {"iterations_to_skip": [2]},
    "growing-batches": GROWING,
    "per-token-loss": {"calculate_per_token_loss": True},
    "untied": {"untie_embeddings_and_output_weights": True},
    "moe": MOE,
    "conversations": CONVERSATIONS,
}

#: Flags of the runs that save the checkpoints; what has parameters of its own has one of its own.
SEEDS: dict[str, dict[str, Any]] = {
    "seed": {},
    "untied": COMPARED["untied"],
    "moe": COMPARED["moe"],
    "dense": {name: None for name in MODEL.argv() if name.startswith("sla")},
}

#: Flags that change how it is computed, not what: each against "plain", in the layouts named.
HOW: dict[str, tuple[str, dict[str, Any]]] = {
    "selective-recompute": ("pp2v2", {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    "uniform-recompute": ("pp2v2", FULL | {"recompute_method": "uniform", "recompute_num_layers": 1}),
    "uniform-recompute-2": ("pp2", FULL | {"recompute_method": "uniform", "recompute_num_layers": 2}),
    "block-recompute": ("pp2v2", FULL | {"recompute_method": "block", "recompute_num_layers": 1}),
    "larger-microbatch-groups": (
        "pp2v2",
        {"microbatch_group_size_per_virtual_pipeline_stage": 3, "global_batch_size": 10},
    ),
    "early-receives": ("pp2v2", {"overlap_p2p_communication_warmup_flush": True}),
}

PIPELINES = ("pp2", "pp2v2")

#: Upstream cannot skip steps with interleaving, dense or not: it takes the list of data iterators for an iterator.
COMPARISONS = [
    (name, layout) for name in COMPARED for layout in PIPELINES if (name, layout) != ("skipped-step", "pp2v2")
]


def _argv(split: Layout | None, /, **flags: Any) -> list[str]:
    base = MODEL.argv() | {"train_iters": STEPS, "lr": 1e-3, "eval_interval": 2, "tensor_model_parallel_size": 1}
    return argv(**base | (split.argv() if split else {}) | flags)


def _requests(folder: Path) -> dict[str, dict[str, Any]]:
    load = {"load": folder / "seed", "finetune": True, "no_load_optim": True, "no_load_rng": True}
    requests = _seeds(folder)
    for name, flags in COMPARED.items():
        saved = {"load": folder / name} if name in SEEDS else {}
        if name == "conversations":
            saved = {"tokenizer_model": folder, "data_path": folder / "conversations.jsonl"}
        requests[f"{name}.pp1"] = _argv(None, **load | flags | saved)
        for layout in [layout for compared, layout in COMPARISONS if compared == name]:
            requests[f"{name}.{layout}"] = _argv(TWO_RANKS[layout], **load | flags | saved)
    for name, (layout, flags) in HOW.items():
        requests[f"{name}.{layout}"] = _argv(TWO_RANKS[layout], **load | flags)
    requests["larger-batch.pp1"] = _argv(None, **load, global_batch_size=10, micro_batch_size=1)
    # Precision: bf16 has 8 bits, fp16 scales its loss.
    for layout in (None, *PIPELINES):
        split = TWO_RANKS[layout] if layout else None
        requests[f"bf16.{layout or 'pp1'}"] = _argv(split, **load, bf16=True)
        requests[f"fp16.{layout or 'pp1'}"] = _argv(split, **load, fp16=True, initial_loss_scale=2.0**16)
    # A loss scale that overflows at first, so that steps are skipped.
    overflow = {"fp16": True, "initial_loss_scale": 2.0**20, "hysteresis": 1}
    requests["overflow.pp2v2"] = _argv(TWO_RANKS["pp2v2"], **load | overflow)
    # Dropout's random numbers differ with the layout, but not from run to run.
    for name in ("dropout", "dropout-again"):
        dropout = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
        requests[f"{name}.pp2v2"] = _argv(TWO_RANKS["pp2v2"], **load, **dropout)
    # A pipeline in which no K/V leave their stage, and one without --sla, in the processes that carried K/V before.
    load |= {"load": folder / "dense"}
    requests["beyond.pp2v2"] = _argv(TWO_RANKS["pp2v2"], **load, sla_skip_distance=8, sla_num_skip_groups=2)
    requests["dense.pp2v2"] = _argv(TWO_RANKS["pp2v2"], **load, **SEEDS["dense"])
    return {name: {"argv": flags, "pipeline": True} for name, flags in requests.items()}


def _seeds(folder: Path) -> dict[str, list[str]]:
    """The runs that save the checkpoints which the others start from."""
    once = {"train_iters": 1, "eval_iters": 0, "save_interval": 1}
    return {f"{name}.seed": _argv(None, **flags | once | {"save": folder / name}) for name, flags in SEEDS.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("options")
    _write_conversations(folder)
    return train_on_all_ranks(_requests(folder), 2, folder / "ranks")


def _write_conversations(folder: Path) -> None:
    """Lines of three conversations, of a few words each, and a tokenizer that knows these words."""
    words = [f"w{number}" for number in range(100)]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    chosen = random.Random(0)
    with (folder / "conversations.jsonl").open("w") as file:
        for _ in range(40):
            messages = [
                {"role": role, "content": " ".join(chosen.choices(words, k=2)) + " "}
                for _ in range(3)
                for role in ("system", "user", "assistant")
            ]
            print(json.dumps({"messages": messages}), file=file)


def _assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float = CLOSE) -> None:
    ours = figures(found)
    for what, values in figures(expected).items():
        assert ours[what] == pytest.approx(values, rel=tolerance), what


@pytest.mark.parametrize(("name", "layout"), COMPARISONS)
def test_as_without_a_pipeline(runs: dict[str, list[dict[str, Any]]], name: str, layout: str) -> None:
    """The same losses, gradient norms and evaluations as PP=1 with the same flags."""
    _assert_close(runs[f"{name}.{layout}"], runs[f"{name}.pp1"])


def test_the_options_did_something(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Different numbers of microbatches did occur, in one run, and a step was skipped."""
    evaluations = runs["more-microbatches-in-evaluation.pp2v2"][0]["steps"]
    assert {(step["forward_only"], step["num_microbatches"]) for step in evaluations} == {(False, 4), (True, 16)}
    growing = runs["growing-batches.pp2v2"][0]["steps"]
    assert [step["num_microbatches"] for step in growing if not step["forward_only"]] == [2, 4, 8, 8]
    assert len(figures(runs["skipped-step.pp2"])["loss"]) == STEPS - 1
    overflowed = [norm is None for norm in figures(runs["overflow.pp2v2"])["grad_norm"]]
    assert set(overflowed) == {True, False}
    assert figures(runs["moe.pp2"])["loss"] != figures(runs["plain.pp2"])["loss"]


@pytest.mark.parametrize("name", HOW)
def test_however_it_is_run(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Recomputation and other orders of passes and messages give the same training."""
    layout, flags = HOW[name]
    reference = "larger-batch.pp1" if "global_batch_size" in flags else f"plain.{layout}"
    _assert_close(runs[f"{name}.{layout}"], runs[reference])


@pytest.mark.parametrize("layout", PIPELINES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(runs: dict[str, list[dict[str, Any]]], precision: str, layout: str) -> None:
    """Losses within a few of bf16's 8 bits, 4e-3, of PP=1; K/V cross in that precision."""
    found, plain = figures(runs[f"{precision}.{layout}"]), figures(runs[f"{precision}.pp1"])
    known = [(ours, theirs) for ours, theirs in zip(found["loss"], plain["loss"], strict=True) if theirs is not None]
    assert known
    for ours, theirs in known:
        assert ours == pytest.approx(theirs, rel=1e-2)


def test_dropout_repeats_bit_for_bit(runs: dict[str, list[dict[str, Any]]]) -> None:
    """The same run twice, dropout on."""
    assert figures(runs["dropout.pp2v2"]) == figures(runs["dropout-again.pp2v2"])
    assert figures(runs["dropout.pp2v2"])["loss"] != figures(runs["plain.pp2v2"])["loss"]


def test_a_pipeline_without_kv_is_upstreams(runs: dict[str, list[dict[str, Any]]]) -> None:
    """A distance beyond the last layer trains as the dense model, bit for bit, and sends what it sends."""
    assert figures(runs["beyond.pp2v2"]) == figures(runs["dense.pp2v2"])
    for beyond, dense in zip(runs["beyond.pp2v2"], runs["dense.pp2v2"], strict=True):
        assert [step["sent"] for step in beyond["steps"]] == [step["sent"] for step in dense["steps"]]


def test_nothing_is_left_after_any_step(runs: dict[str, list[dict[str, Any]]]) -> None:
    """No K/V tensor is alive, with recomputation, evaluation and skipped steps too."""
    for name, ranks in runs.items():
        for answer in ranks:
            assert answer["alive"] == 0, name
            assert [step["left"] for step in answer["steps"]] == [0] * len(answer["steps"]), name
