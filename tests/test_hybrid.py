"""Hybrid models: attention layers share K/V, layers of other kinds pass them by.

Against the plain reference, against the GPT whose layers they are, and in pipelines against no pipeline.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sla_megatron.attention.declared import declare
from sla_megatron.attention.numbering import LayerNumbers
from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.payload import MicrobatchShape
from sla_megatron.pipeline.routes import RoutePlan
from sla_megatron.upstream.megatron_version import megatron_flavour
from tests.support.card_figures import differences, launched
from tests.support.launch import run_worker
from tests.support.parity import FROM_ONE, parity_case, relative_errors
from tests.support.pipelines import (
    GLOBAL_BATCH,
    GROUPS,
    HIDDEN,
    MICRO_BATCH,
    ROPE,
    SEQUENCE,
    Layout,
    Model,
    expected_wire,
    hop_elements,
)
from tests.support.runs import argv
from tests.test_pipeline import Runs, assert_same_figures, assert_same_gradients

pytestmark = pytest.mark.distributed

# As in test_parity.py.
TOLERANCE = 1e-5

BASE = parity_case(distances=[1])
EXPERTS = {"bias": False, "swiglu": True}

#: Patterns against the reference, which takes the layers in turn.
CASES: dict[str, dict[str, Any]] = {
    "gpt": {"pattern": "*-*-*-*-", "distances": [3, 1], "groups": 2, "skip_groups": 2},
    "two-and-two": {"pattern": "**--", "rms_norm": False, "rope": False},
    "experts": {"pattern": "*E*-", **EXPERTS},
    "ends-in-attention": {"pattern": "*-*", "projection": "pruned", "qk_norm": True},
    "begins-with-others": {"pattern": "-E**-*", **EXPERTS, "distances": [2, 1], "projection": "pruned"},
    "tp2": {"pattern": "*--**", "tp": 2, "sequence_parallel": True, "distances": [2, 1], "skip_groups": 4},
    "cp2": {"pattern": "-**-*", "cp": 2, "core_attention": "sdpa", "distances": [2]},
    # Chunks of mixed layers, in which a source and its reader lie together, apart, and beside a chunk of none.
    "uniform-3": {"pattern": "*--*-***", "recompute": "uniform3", "distances": [2, 1]},
    "block": {"pattern": "*-*E*", "recompute": "block", **EXPERTS},
    # SkipV1Former's: all read the first attention layer, which is not the first layer.
    "values-from-one": {"pattern": "-*-**-*", "recompute": "uniform3", **FROM_ONE, "projection": "pruned"},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """All cases in one group of two gloo ranks."""
    cases = {name: BASE | case for name, case in CASES.items()}
    # Controls: the reference reads another layer.
    cases["mistaken"] = BASE | CASES["gpt"] | {"mistake": {"distances": [2, 1]}}
    return run_worker("parity_worker", cases, 2, tmp_path_factory.mktemp("parity"))[0]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_gradient(answers: dict[str, dict[str, float]], name: str) -> None:
    """As of the plain model whose layers the pattern names."""
    errors = relative_errors(answers[name], attention=CASES[name]["pattern"].rindex("*"))
    assert {tensor: error for tensor, error in errors.items() if not error <= TOLERANCE} == {}


def test_another_source_is_seen(answers: dict[str, dict[str, float]]) -> None:
    """The comparison finds a model whose attention reads another layer."""
    assert answers["mistaken"]["logits"] > 100 * TOLERANCE


STEPS = 2
#: Whole models: pattern, and what skips.
MODELS: dict[str, tuple[str, Model]] = {
    "pairs": ("*-*-*-*-", Model(4, (3, 1), 4, flags=ROPE)),
    "pairs-pruned": ("*-*-*-*-", Model(8, (2, 1), 4, "pruned")),
    "uneven": ("*-*---**-", Model(8, (3, 1), 4, "pruned", ROPE)),
    "scattered": ("-*-*-*-", Model(8, (2, 1), 4, flags=ROPE)),
    "experts": ("*E*E", Model(4, (1,), 3, flags=ROPE)),
    "mean": ("M*-M*-", Model(4, (1,), 2)),
}
#: What else a model's flags are.
FLAGS: dict[str, dict[str, Any]] = {
    "experts": {"num_experts": 4, "moe_router_topk": 2, "swiglu": True, "moe_ffn_hidden_size": 32},
    "mean": {"spec": ["tests.support.hybrid_layers", "STACK"]},
}
FLAGS["experts"] |= {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
#: Those that start from a GPT's checkpoint, which dev does not load into a hybrid model.
LOADS_GPTS = megatron_flavour().name != "dev"
OF_GPTS = ("pairs", "pairs-pruned")


def split(pattern: str, pipeline: int, **sizes: int) -> Layout:
    """Of a pattern with ``|``; K/V know of attention layers alone."""
    stages = tuple(segment.count("*") for segment in pattern.split("|"))
    # In one word: a pattern may begin with a dash.
    return Layout(pipeline, stages, ((f"hybrid_layer_pattern={pattern}", True), ("num_layers", None)), **sizes)


FULL = {"recompute_granularity": "full"}
#: Model and name -> its stages, and flags that change how it is computed, not what.
SPLITS: dict[tuple[str, str], tuple[Layout, dict[str, Any]]] = {
    ("pairs", "pp2"): (split("*-*-|*-*-", 2), {}),
    ("pairs", "pp2v2"): (split("*-|*-|*-|*-", 2), {}),
    # K/V cross a stage without attention; without interleaving, and with.
    ("uneven", "pp4"): (split("*-*|--|-*|*-", 4), {}),
    ("uneven", "pp2v2"): (split("*-*|--|-*|*-", 2), {}),
    ("uneven", "pp2v2-block"): (
        split("*-*|--|-*|*-", 2),
        FULL | {"recompute_method": "block", "recompute_num_layers": 1},
    ),
    # Stages without layers too, and a last one without attention.
    ("uneven", "pp2v3-empty"): (split("*-*--||-*|*||-", 2), {}),
    ("scattered", "pp4"): (split("-|*|-|*-*-", 4), {}),
    ("scattered", "tp2pp2"): (split("-*-|*-*-", 2, tensor=2), {}),
    ("scattered", "cp2pp2"): (split("-*-*|-*-", 2, context=2), {}),
    ("scattered", "pp2-uniform"): (
        split("-*-*|-*-", 2),
        FULL | {"recompute_method": "uniform", "recompute_num_layers": 3},
    ),
    ("experts", "ep2pp2"): (split("*E|*E", 2), {"expert_model_parallel_size": 2}),
    ("mean", "pp2-uniform"): (
        split("M*-|M*-", 2),
        FULL | {"recompute_method": "uniform", "recompute_num_layers": 2},
    ),
}
REPEATED = ("uneven", "pp2v2")
DENSE = ("dense", "dense.empty-stage", "beyond")
#: Of a script of one's own; the others are of the entry point.
OWN_SCRIPT = "pairs.pp2v2"
OF_SLA = ("sla", "sla_skip_distance", "sla_num_skip_groups", "sla_kv_projection")


def flags_of(name: str, layout: Layout, **flags: Any) -> list[str]:
    """Two steps, of which the first has learning rate 0: what is saved after it are the weights that it began with."""
    base = {"train_iters": STEPS, "lr": 1e-3, "no_load_optim": True, "no_load_rng": True}
    model = MODELS[name][1].argv() | FLAGS.get(name, {})
    return argv(**model | base | {"lr_warmup_iters": 1} | layout.argv() | flags)


def _whole(folder: Path) -> dict[str, list[str]]:
    """Flags of the runs without a pipeline."""
    requests = {}
    for name, (pattern, _) in MODELS.items():
        starts = {}
        if name in OF_GPTS and LOADS_GPTS:
            # A GPT of as many layers, from whose checkpoint the hybrid model starts.
            gpt = Layout(1, (pattern.count("*"),), (("num_layers", pattern.count("*")),))
            requests[f"{name}.gpt"] = flags_of(name, gpt, save=folder / f"{name}.gpt", save_interval=1)
            starts = {"load": folder / f"{name}.gpt", "ckpt_step": 1, "finetune": True}
        saves = {"save": folder / name, "save_interval": 1}
        requests[f"{name}.pp1"] = flags_of(name, split(pattern, 1), **saves, **starts)
    whole = split(MODELS["scattered"][0], 1)
    dense = dict.fromkeys(OF_SLA)
    requests["dense"] = flags_of("scattered", whole, **dense, save=folder / "dense", save_interval=1)
    start = {"load": folder / "dense", "ckpt_step": 1, "finetune": True}
    requests["dense.empty-stage"] = flags_of("scattered", split("-*-*||-*-|", 2), **dense, **start)
    # Far beyond the last attention layer, though not beyond the last layer of the stack.
    requests["beyond"] = flags_of("scattered", whole, sla_skip_distance=[4])
    return requests


def _divided(folder: Path, world_size: int) -> dict[str, list[str]]:
    """Flags of the runs of :data:`SPLITS` that are on so many ranks."""
    requests = {}
    for (name, layout), (stages, flags) in SPLITS.items():
        ranks = stages.pipeline * stages.ranks * flags.get("expert_model_parallel_size", 1)
        if ranks == world_size:
            start = {"load": folder / name, "ckpt_step": 1, "finetune": True}
            requests[f"{name}.{layout}"] = flags_of(name, stages, **start, **flags)
    if ".".join(REPEATED) in requests:
        requests["repeated"] = requests[".".join(REPEATED)]
    return requests


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Megatron's own trainer, in a group of two gloo ranks and one of four."""
    folder = tmp_path_factory.mktemp("hybrid")
    runs = Runs(folder)
    for world_size, flags in ((2, _whole(folder) | _divided(folder, 2)), (4, _divided(folder, 4))):
        requests = {name: {"argv": words, "pipeline": True} for name, words in flags.items()}
        if OWN_SCRIPT in requests:
            requests[OWN_SCRIPT]["entry"] = "own-hybrid"
        runs.add(requests, world_size, folder / str(world_size))
    return runs


def name_in_gpt(name: str) -> str:
    """Of a parameter of ``*-*-..``: layer 2i is the attention of the GPT's layer i, layer 2i + 1 its MLP."""
    before, found, after = name.replace("final_norm", "final_layernorm").partition("decoder.layers.")
    number, _, rest = after.partition(".")
    return f"{before}{found}{int(number) // 2}.{rest}" if found else before


@pytest.mark.skipif(not LOADS_GPTS, reason="this Megatron does not load a GPT's checkpoint into a hybrid model")
@pytest.mark.parametrize("name", OF_GPTS)
def test_is_the_gpt_whose_checkpoint_it_loads(runs: Runs, name: str) -> None:
    """Losses, gradient norms, evaluations, and each gradient of the first step."""
    assert_same_figures(runs, f"{name}.pp1", f"{name}.gpt", STEPS)
    gradients, expected = runs.gradients(f"{name}.pp1"), runs.gradients(f"{name}.gpt")
    renamed = {name_in_gpt(parameter): gradient for parameter, gradient in gradients.items()}
    assert len(expected) == len(gradients)
    assert_same_gradients(renamed, expected)


def test_where_nothing_skips_it_is_the_dense_model(runs: Runs) -> None:
    """Bit for bit; with heads that skip it is another."""
    assert runs.figures("beyond") == runs.figures("dense")
    assert runs.figures("dense")["loss"] != runs.figures("scattered.pp1")["loss"]


def test_a_stage_without_layers_hands_on_a_copy(runs: Runs) -> None:
    """Without ``--sla`` too, where nothing is packed; upstream's own stack has other gradients there."""
    assert_same_figures(runs, "dense.empty-stage", "dense", STEPS)
    assert_same_gradients(runs.gradients("dense.empty-stage"), runs.gradients("dense"))


@pytest.mark.parametrize(("name", "layout"), SPLITS)
def test_trains_as_without_a_pipeline(runs: Runs, name: str, layout: str, card: Callable) -> None:
    """The same."""
    assert_same_figures(runs, f"{name}.{layout}", f"{name}.pp1", STEPS)
    gradients, expected = runs.gradients(f"{name}.{layout}"), runs.gradients(f"{name}.pp1")
    if layout == "ep2pp2":
        # Each rank has its own experts, under names that begin again; of the first rank's the numbers are the same.
        expected = {parameter: gradient for parameter, gradient in expected.items() if parameter in gradients}
        assert len(expected) > len(gradients) // 2
    assert_same_gradients(gradients, expected)
    stages, _ = SPLITS[name, layout]
    found = partial(differences, runs, f"{name}.{layout}", f"{name}.pp1", MODELS[name][1], stages)
    card("hybrid-model", launched(2, flags_of(name, stages, load=name, finetune=True)), found)


@pytest.mark.parametrize(("name", "layout"), SPLITS)
def test_bytes_on_the_wire_are_the_lower_bound(runs: Runs, name: str, layout: str) -> None:
    """The specification's, of attention layers alone; in each step of training and evaluation."""
    (stages, _), ranks = SPLITS[name, layout], runs.answers[f"{name}.{layout}"]
    data_parallel = len(ranks) // (stages.pipeline * stages.ranks)
    for rank, answer in enumerate(ranks):
        pipeline_rank, tensor_rank = rank // (stages.ranks * data_parallel), rank % stages.tensor
        assert len(answer["steps"]) > STEPS
        for step in answer["steps"]:
            assert step["num_microbatches"] == GLOBAL_BATCH // MICRO_BATCH // data_parallel
            passes = step["num_microbatches"], step["forward_only"]
            expected = expected_wire(MODELS[name][1], stages, pipeline_rank, tensor_rank, *passes)
            for what in ("sent", "received"):
                found = {way: Counter(map(math.prod, shapes)) for way, shapes in step[what].items()}
                assert found == {way: +counted for way, counted in expected[what].items()}, (rank, what)


@pytest.mark.parametrize(("name", "layout"), SPLITS)
def test_the_plan_says_so(name: str, layout: str) -> None:
    """Payloads of the plan that the transport goes by, and ``sla-plan`` prints, against the same bound."""
    (pattern, model), (stages, _) = MODELS[name], SPLITS[name, layout]
    text = stages.flags[0][0].partition("=")[2]
    numbers = LayerNumbers.of_pattern(pattern)
    sla = SLAConfig(len(numbers.attention), GROUPS, model.distances, model.num_skip_groups)
    layout_of_all = PipelineLayout.of_sizes(stages.pipeline, map(len, text.split("|")))
    plan = RoutePlan(declare(sla, numbers, stages.tensor, model.head_size), layout_of_all)
    sizes = (SEQUENCE, MICRO_BATCH, HIDDEN, stages.tensor, stages.context, stages.tensor > 1)
    for rank in range(stages.tensor):
        columns = [plan.hop_columns(hop, rank) for hop in range(len(stages.stages) - 1)]
        found = [MicrobatchShape(*sizes).payload_elements(one) for one in columns]
        assert found == hop_elements(model, stages, rank)
    assert not plan.moves_nothing


def test_repeats_bit_for_bit(runs: Runs) -> None:
    """The order in which gradients are summed is fixed."""
    assert runs.figures("repeated") == runs.figures(".".join(REPEATED))


def test_nothing_is_left_after_a_step(runs: Runs) -> None:
    """K/V were shared, and none is alive after a step."""
    for name, ranks in runs.answers.items():
        assert (sum(answer["num_shared"] for answer in ranks) > 0) == (name not in DENSE), name
        assert [answer["alive"] for answer in ranks] == [0] * len(ranks), name
        assert {step["left"] for answer in ranks for step in answer["steps"]} == {0}, name


def test_what_skips_is_said_of_attention_layers(runs: Runs) -> None:
    """The nine layers of the stack have four of these; the nearest distance is 1."""
    assert "in attention layers 2-4 of 4; " in runs.answers["uneven.pp1"][0]["stdout"]
