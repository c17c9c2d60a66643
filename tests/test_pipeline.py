"""Pipelines on real ranks and Megatron's schedules: training, bytes on the wire and memory against PP=1 and the bound.

Every run starts from one checkpoint of its model and sees the same batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from sla_megatron.attention.declared import declare
from sla_megatron.attention.numbering import LayerNumbers
from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.payload import MicrobatchShape
from sla_megatron.pipeline.residency import residency
from sla_megatron.pipeline.routes import RoutePlan
from sla_megatron.pipeline.schedule import Schedule
from tests.support.card_figures import differences, launched
from tests.support.indexed_files import write_indexed
from tests.support.pipelines import (
    FOUR_RANKS,
    GLOBAL_BATCH,
    GROUPS,
    HIDDEN,
    LAYERS,
    LAYOUTS,
    MICRO_BATCH,
    MODELS,
    SEQUENCE,
    TWO_RANKS,
    VARIANTS,
    expected_wire,
)
from tests.support.runs import argv, figures, train_on_all_ranks

pytestmark = pytest.mark.distributed

STEPS = 2

# fp32 rounding, 6e-8, in sums of another order; two small optimizer steps do not amplify it tenfold.
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
# Some gradients are zero but for rounding, as that of a key norm's bias: it adds the same to all of a query's scores.
NOTHING = 1e-8

#: Two models each, of which one has MHA, full projections or long distances where the other has GQA, pruned or short.
OPPOSITES = (
    ("gqa-pruned-two-short", "mha-full-long"),
    ("mha-pruned-two-long", "gqa-full-short"),
    ("gqa-pruned-long", "mha-full-short"),
    ("gqa-full-long-and-short", "mha-pruned-short"),
)
#: All models interleaved on two ranks; in every other layout two that are opposites.
CASES = [(model, "pp2v2") for models in OPPOSITES for model in models]
CASES += [
    (model, layout)
    for layout, models in zip([layout for layout in LAYOUTS if layout != "pp2v2"], cycle(OPPOSITES))
    for model in models
]
#: K/V that cross hops alone, that stay, that pass stages without layers, on more ranks, and over context-parallel ones.
TWICE = ("pp2", "pp2v2", "pp2v2-empty-stages", "pp4v2", "tp2pp2v2", "cp2pp2v2")
REPEATED = [next(case for case in CASES if case[1] == layout) for layout in TWICE]
#: Tensors with many readers, in stages before and behind each other and on all ranks; keys or values alone.
VARIANT_CASES = [(model, "pp2v2") for model in VARIANTS]
VARIANT_CASES += [("skipv1", "pp2"), ("skipv1", "pp2v4"), ("half-shared", "pp2v4"), ("values-two-sources", "pp2v4")]
VARIANT_CASES += [("values-two-sources", "pp4"), ("skipv1", "pp4v2"), ("half-shared", "pp4v2")]
VARIANT_CASES += [("values-two-sources", "tp2pp2")]
CASES += VARIANT_CASES
REPEATED += [("skipv1", "pp2v4"), ("half-shared", "pp2v2"), ("half-shared", "pp4v2"), ("values-two-sources", "pp2v4")]
#: How messages go when it is repeated: neither their order nor when they come may change a sum.
MESSAGES: dict[tuple[str, str], dict[str, Any]] = {
    ("skipv1", "pp2v4"): {"overlap_p2p_communication_warmup_flush": True},
    ("half-shared", "pp4v2"): {"no_overlap_p2p_communication": True},
}
#: With full recomputation: a checkpoint for each layer, or for two: both read, or one makes what the other reads.
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform"}
RECOMPUTED = {
    ("skipv1", "pp2v2"): UNIFORM | {"recompute_num_layers": 2},
    ("half-shared", "pp2v4"): UNIFORM | {"recompute_num_layers": 1},
    ("values-two-sources", "pp2v2"): UNIFORM | {"recompute_num_layers": 1},
}

#: Short documents, which attention does not leave: all stages need the mask, those between the ends too.
DOCUMENTS = {"mock_data": None, "split": "8,1,1", "reset_attention_mask": True, "reset_position_ids": True}
# Context-parallel ranks have other numbers of tokens that count, over which Megatron averages each by itself without.
DOCUMENTS |= {"eod_mask_loss": True, "calculate_per_token_loss": True}
DOCUMENT_MODELS = {"sla": {}, "dense": dict.fromkeys(name for name in MODELS["gqa-full-short"].argv() if "sla" in name)}
#: With middle stages on ranks of their own, on ranks that have an end too, and on ranks that read nothing themselves.
DOCUMENT_LAYOUTS = ("pp2v2", "pp4", "tp2pp2v2", "cp2pp2v2")
DOCUMENT_CASES = [("sla", layout) for layout in DOCUMENT_LAYOUTS] + [("dense", "pp2v2"), ("dense", "cp2pp2v2")]
#: The same without masks, rotary embedding and learned positions; in these layouts.
PACKED = {"reset_attention_mask": None, "reset_position_ids": None, "core_attention": "sdpa"}
PACKED |= {"dataloader_inter_document_masking": True}
PACKED_MODELS = {"sla": "gqa-full-short", "learned": "mha-pruned-short"}
PACKED_CASES = [("sla", layout) for layout in ("pp1", "pp2v2", "tp2pp2v2", "cp2pp2v2")]
PACKED_CASES += [("learned", "pp1"), ("learned", "cp2pp2v2")]


def _documents(folder: Path, layouts: Iterable[str]) -> dict[str, dict[str, Any]]:
    data = DOCUMENTS | {"data_path": folder / "documents", "data_cache_path": folder / "cache"}
    requests = {}
    for layout in layouts:
        split = LAYOUTS[layout].argv() if layout in LAYOUTS else {"tensor_model_parallel_size": 1}
        for name, flags in DOCUMENT_MODELS.items():
            if layout != "pp1" and (name, layout) not in DOCUMENT_CASES:
                continue
            requests[f"documents.{name}.{layout}"] = model_flags("gqa-full-short", folder, **data | flags | split)
        for name, model in PACKED_MODELS.items():
            if layout == "pp1":
                requests[f"documents.{name}.{layout}"] = model_flags(model, folder, **data | split)
            if (name, layout) in PACKED_CASES:
                requests[f"packed.{name}.{layout}"] = model_flags(model, folder, **data | split | PACKED)
    return {name: {"argv": flags, "pipeline": True} for name, flags in requests.items()}


def model_flags(model: str, folder: Path, **flags: Any) -> list[str]:
    base = {"train_iters": STEPS, "lr": 1e-3, "no_load_optim": True, "no_load_rng": True}
    return argv(**MODELS[model].argv() | base | {"load": folder / model, "finetune": True} | flags)


def _requests(folder: Path, layouts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    requests = {}
    for model, layout in [case for case in CASES if case[1] in layouts]:
        request = {"argv": model_flags(model, folder, **LAYOUTS[layout].argv()), "pipeline": True}
        requests[f"{model}.{layout}"] = request
        if (model, layout) in REPEATED:
            flags = LAYOUTS[layout].argv() | MESSAGES.get((model, layout), {})
            requests[f"{model}.{layout}.repeated"] = request | {"argv": model_flags(model, folder, **flags)}
        if flags := RECOMPUTED.get((model, layout)):
            recomputes = {"argv": model_flags(model, folder, **LAYOUTS[layout].argv() | flags), "pipeline": True}
            requests[f"{model}.{layout}.recomputed"] = recomputes
    return requests


class Runs:
    """The answers of all ranks of each run, and the gradients that they wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self._where: dict[str, Path] = {}

    def add(self, requests: dict[str, dict[str, Any]], world_size: int, folder: Path) -> None:
        self.answers |= train_on_all_ranks(requests, world_size, folder)
        self._where |= dict.fromkeys(requests, folder)

    def figures(self, name: str) -> dict[str, list[Any]]:
        return figures(self.answers[name])

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for path in self._where[name].glob(f"{name}.rank*.pt"):
            found |= torch.load(path)
        return found


def _asked(requests: dict[str, dict[str, Any]], items: Iterable[pytest.Item]) -> dict[str, dict[str, Any]]:
    """Those of ``requests`` that the chosen tests of this file look at (``-k``): all of them take minutes."""
    chosen = [getattr(item, "callspec", None) for item in items if item.path == Path(__file__)]
    if None in chosen:
        return requests
    cases = {(one.params["model"], one.params["layout"]) for one in chosen}
    models = {model for model, _ in cases}
    if models & (DOCUMENT_MODELS.keys() | PACKED_MODELS.keys()):
        models |= {"one-mask", *PACKED_MODELS.values()}

    def is_asked(name: str) -> bool:
        model, layout, *_ = name.removeprefix("documents.").removeprefix("packed.").split(".")
        return (model, layout) in cases or (layout in ("seed", "pp1") and model in models)

    return {name: one for name, one in requests.items() if is_asked(name)}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("pipeline")
    once = {"train_iters": 1, "eval_iters": 0, "save_interval": 1, "tensor_model_parallel_size": 1}
    # In the same processes as what starts from them.
    seeds = {
        f"{model}.seed": {"argv": argv(**settings.argv() | once | {"save": folder / model}), "pipeline": True}
        for model, settings in MODELS.items()
    }
    runs = Runs(folder)
    plain = {
        f"{model}.pp1": {"argv": model_flags(model, folder, tensor_model_parallel_size=1), "pipeline": True}
        for model in MODELS
    }
    # The tokenizer's end of a document is its last token.
    write_indexed(folder / "documents", documents=400, length=6, vocabulary=126, end=126)
    apart = _documents(folder, ("pp1", "pp2v2"))
    one_mask = [word for word in apart["documents.sla.pp1"]["argv"] if not word.startswith("--reset-")]
    apart["documents.one-mask.pp1"] = {"argv": one_mask, "pipeline": True}
    two = seeds | plain | _requests(folder, TWO_RANKS) | apart
    four = _requests(folder, FOUR_RANKS) | _documents(folder, ("pp4", "tp2pp2v2", "cp2pp2v2"))
    runs.add(_asked(two, request.session.items), 2, folder / "two")
    if four := _asked(four, request.session.items):
        runs.add(four, 4, folder / "four")
    return runs


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_trains_as_without_a_pipeline(runs: Runs, model: str, layout: str, card: Callable) -> None:
    """Two steps: loss, gradient norm and evaluations; and every parameter's gradient in the first."""
    assert_trains_as(runs, f"{model}.{layout}", f"{model}.pp1")
    found = partial(differences, runs, f"{model}.{layout}", f"{model}.pp1", MODELS[model], LAYOUTS[layout])
    card("pipeline", launched(2, model_flags(model, Path("."), **LAYOUTS[layout].argv())), found)


@pytest.mark.parametrize(("model", "layout"), DOCUMENT_CASES)
def test_every_stage_keeps_documents_apart(runs: Runs, model: str, layout: str) -> None:
    """``--reset-attention-mask`` means on each stage what it means without a pipeline; and it does mean something."""
    assert_trains_as(runs, f"documents.{model}.{layout}", f"documents.{model}.pp1")
    apart, mixed = (runs.figures(f"documents.{name}.pp1")["loss"] for name in ("sla", "one-mask"))
    assert apart != pytest.approx(mixed, rel=100 * LOSS_TOLERANCE)


@pytest.mark.parametrize(("model", "layout"), PACKED_CASES)
def test_packed_documents_train_as_masked_ones(runs: Runs, model: str, layout: str, card: Callable) -> None:
    """``--dataloader-inter-document-masking`` is what ``--reset-attention-mask`` is with Megatron's own attention."""
    name, masked = f"packed.{model}.{layout}", f"documents.{model}.pp1"
    assert_trains_as(runs, name, masked)
    assert all(answer["alive"] == 0 for answer in runs.answers[name])
    found = partial(differences, runs, name, masked, MODELS[PACKED_MODELS[model]], LAYOUTS.get(layout))
    card("context-parallelism", launched(4, _documents(Path("."), [layout])[name]["argv"]), found)


def assert_trains_as(
    runs: Runs,
    name: str,
    reference: str,
    loss_tolerance: float = LOSS_TOLERANCE,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
) -> None:
    """Losses, gradient norms and evaluations of all steps, and every gradient of the first; ``test_gpus.py``'s too."""
    assert_same_figures(runs, name, reference, STEPS, loss_tolerance)
    assert_same_gradients(runs.gradients(name), runs.gradients(reference), gradient_tolerance)


def assert_same_figures(runs: Runs, name: str, reference: str, steps: int, tolerance: float = LOSS_TOLERANCE) -> None:
    """Losses, gradient norms and evaluations of all steps."""
    found, plain = runs.figures(name), runs.figures(reference)
    assert len(found["loss"]) == steps
    for what in ("loss", "grad_norm", "evaluations"):
        assert found[what] == pytest.approx(plain[what], rel=tolerance), what


def assert_same_gradients(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = GRADIENT_TOLERANCE
) -> None:
    """Every gradient, by its parameter's name."""
    assert set(expected) <= set(gradients)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (gradients[name].double() - gradient).norm()
        assert error <= tolerance * gradient.norm() + NOTHING * whole, name


@pytest.mark.parametrize(("model", "layout"), REPEATED)
def test_repeats_bit_for_bit(runs: Runs, model: str, layout: str) -> None:
    """The order in which gradients are summed is fixed."""
    assert_same_bits(runs, f"{model}.{layout}.repeated", f"{model}.{layout}")


def assert_same_bits(runs: Runs, name: str, reference: str) -> None:
    """All figures, and every gradient of the first step, to the last bit."""
    assert runs.figures(name) == runs.figures(reference)
    found, expected = runs.gradients(name), runs.gradients(reference)
    assert found.keys() == expected.keys() and found
    assert [parameter for parameter in found if not torch.equal(found[parameter], expected[parameter])] == []


@pytest.mark.parametrize(("model", "layout"), RECOMPUTED)
def test_recomputed_layers_share_as_others(runs: Runs, model: str, layout: str) -> None:
    """The same training and bytes, with what many layers read in and out of each checkpoint; nothing stays."""
    name = f"{model}.{layout}.recomputed"
    assert_trains_as(runs, name, f"{model}.pp1")
    assert_bound(runs, name, model, layout)
    for answer in runs.answers[name]:
        assert answer["alive"] == 0 and [step["left"] for step in answer["steps"]] == [0] * len(answer["steps"])


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_bytes_on_the_wire_are_the_lower_bound(runs: Runs, model: str, layout: str) -> None:
    """Every tensor handed to isend and irecv, forward and backward, in training and evaluation."""
    assert_bound(runs, f"{model}.{layout}", model, layout)


@pytest.mark.parametrize(("model", "layout"), [case for case in PACKED_CASES if case[1] in LAYOUTS])
def test_so_they_are_with_packed_documents(runs: Runs, model: str, layout: str) -> None:
    """However many documents a sample has, and wherever they end."""
    assert_bound(runs, f"packed.{model}.{layout}", PACKED_MODELS[model], layout)


def assert_bound(runs: Runs, name: str, model: str, layout: str) -> None:
    """A run of ``model`` in ``layout`` sent and received the specification's lower bound, in each of its steps."""
    split, ranks = LAYOUTS[layout], runs.answers[name]
    data_parallel = len(ranks) // (split.pipeline * split.ranks)
    for rank, answer in enumerate(ranks):
        # Megatron's order of ranks: tensor-parallel ranks are neighbours, pipeline ranks are furthest apart.
        pipeline_rank, tensor_rank = rank // (split.ranks * data_parallel), rank % split.tensor
        assert len(answer["steps"]) > STEPS, "training and evaluation"
        for step in answer["steps"]:
            assert step["num_microbatches"] == GLOBAL_BATCH // MICRO_BATCH // data_parallel
            expected = expected_wire(
                MODELS[model], split, pipeline_rank, tensor_rank, step["num_microbatches"], step["forward_only"]
            )
            for what in ("sent", "received"):
                for direction, shapes in step[what].items():
                    found = Counter(map(math.prod, shapes))
                    assert found == +expected[what][direction], (rank, what, direction)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_live_kv_is_what_the_plan_says(runs: Runs, model: str, layout: str) -> None:
    """Between two passes the memory of K/V and their gradients is the plan's figure, and nothing after a step."""
    settings, split, ranks = MODELS[model], LAYOUTS[layout], runs.answers[f"{model}.{layout}"]
    sla = SLAConfig(
        *(LAYERS, GROUPS, settings.distances, settings.num_skip_groups, settings.layers, settings.projection),
        share=settings.share,
        source_layers=settings.sources,
    )
    declared = declare(sla, LayerNumbers.of_gpt(LAYERS), split.tensor, settings.head_size)
    plan = RoutePlan(declared, PipelineLayout.of_sizes(split.pipeline, split.stages))
    shape = MicrobatchShape(SEQUENCE, MICRO_BATCH, HIDDEN, split.tensor, split.context)
    data_parallel = len(ranks) // (split.pipeline * split.ranks)
    for rank, answer in enumerate(ranks):
        assert answer["alive"] == 0
        for step in answer["steps"]:
            schedule = Schedule(
                split.pipeline,
                plan.layout.num_chunks,
                step["num_microbatches"],
                forward_only=step["forward_only"],
            )
            pipeline_rank = rank // (split.ranks * data_parallel)
            expected = residency(plan, schedule, shape, pipeline_rank, rank % split.tensor)
            assert step["live"] == 4 * expected.resident
            assert step["left"] == 0
            assert step["passes"] == "".join(kind for kind, _, _ in schedule.passes(pipeline_rank))


def test_the_tests_see_kv_travel_and_stay(runs: Runs) -> None:
    """Some of these runs move K/V over hops and keep some resident: no comparison above is of nothing."""
    steps = [(name, rank["steps"][0]) for name, ranks in runs.answers.items() for rank in ranks]
    assert sum(any(shape[2] > 32 for shape in step["sent"]["next"]) for _, step in steps) > len(steps) // 4
    assert sum(step["live"] > 0 for _, step in steps) > 20
