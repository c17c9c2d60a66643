"""A training step as one CUDA graph, on real ranks without a GPU: recorded in one step, run again in those after it.

Upstream's own ``FullCudaGraphWrapper`` decides what is recorded and when; what stands for the graph is
``support/recorded_graph.py``.  A step that waits for the host cannot be recorded, and one that needs anything that
Python does between operations has other losses when it is run again.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.runs import NO_DROPOUT, argv, figures, train_on_all_ranks

pytestmark = pytest.mark.distributed

#: The first step runs as always, the second is recorded, the third is a replay.
STEPS = 3
SLA = {"sla": True, "sla_skip_distance": [2, 1], "sla_num_skip_groups": 3}
COMMON = {"train_iters": STEPS, "no_check_for_nan_in_loss_and_grad": True, "core_attention": "sdpa", **NO_DROPOUT}
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2},
    "pp2v2": {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
    },
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PRUNED = {"sla_kv_projection": "pruned"}
CASES = {
    "dense": LAYOUTS["pp2v2"],
    "tp2": LAYOUTS["tp2"] | SLA,
    "pp2": LAYOUTS["pp2"] | SLA | FULL,
    "pp2v2": LAYOUTS["pp2v2"] | SLA | PRUNED,
}

#: Attention that looks at a value; and attention that depends on how often Python came by.
BROKEN = {
    "count": "counted.append(1); query = query * (1 + len(counted) / 100)",
    "value": "query = query * float(query.abs().max() > 0)",
}
SCRIPT = """
from sla_megatron import pretrain_gpt
from sla_megatron.attention.self_attention import SLASelfAttention

ours, counted = SLASelfAttention.get_query_key_value_tensors, []

def broken(*args, **kwargs):
    query, *others = ours(*args, **kwargs)
    {line}
    return query, *others

SLASelfAttention.get_query_key_value_tensors = broken
try:
    pretrain_gpt.main()
finally:
    SLASelfAttention.get_query_key_value_tensors = ours
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every run, eager and recorded, in one group of ranks."""
    folder = tmp_path_factory.mktemp("graphs")
    runs: dict[str, dict[str, Any]] = {name: {"argv": argv(**COMMON | flags)} for name, flags in CASES.items()}
    for name, line in BROKEN.items():
        script = folder / f"{name}.py"
        script.write_text(SCRIPT.format(line=line))
        runs[name] = {"argv": argv(**COMMON | CASES["tp2"]), "entry": str(script)}
    recorded = {f"{name}, recorded": run | {"graphs": True} for name, run in runs.items()}
    # It shall not be recorded, and is the last, since its step ends in the middle.
    runs.pop("value")
    return train_on_all_ranks(runs | recorded, 2, folder)


@pytest.mark.parametrize("name", CASES)
def test_replays_are_steps(answers: dict[str, Any], name: str) -> None:
    """Losses, gradient norms and evaluations bit for bit, of replays as of the step that is recorded; no K/V live."""
    eager, recorded = answers[name], answers[f"{name}, recorded"]
    assert len(figures(eager)["loss"]) == STEPS
    assert figures(recorded) == figures(eager)
    for answer in recorded:
        # Training, and evaluation: of two, on the validation and on the test set, the second is recorded.
        (operations, replays, waits), (of_evaluation, *_) = answer["graphs"]
        assert replays == STEPS - 1 and operations > of_evaluation > 100
        # Upstream's, after each exchange of plain 1F1B: why that is refused.
        assert (waits > 0) == (name == "pp2")
        assert answer["alive"] == 0


def test_what_waits_for_the_host_is_found(answers: dict[str, Any]) -> None:
    """Control: its first step runs, and the second is not recorded."""
    assert [len(answer["grad_norm"]) for answer in answers["value, recorded"]] == [1, 1]
    assert {answer["status"] for answer in answers["value, recorded"]} == {
        "needs the host: aten._local_scalar_dense.default"
    }


def test_what_python_counts_is_found(answers: dict[str, Any]) -> None:
    """Control: the recorded step is right, and a replay is wrong."""
    eager, recorded = figures(answers["count"])["loss"], figures(answers["count, recorded"])["loss"]
    assert [one == other for one, other in zip(eager, recorded, strict=True)] == [True, True, False]
