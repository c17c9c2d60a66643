"""Checkpoints on four gloo ranks, saved at one tensor-parallel size and loaded at another; the settings they carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import CLOSE, CPU_FLAGS, NO_DROPOUT, argv, train

pytestmark = pytest.mark.distributed

SAVED_AT, LAST = 2, 4

#: By projection mode: the sizes to train at, and pairs of the size saved at and the size loaded at.
SIZES = {"full": (1, 2, 4), "pruned": (1, 4)}
RESHARDINGS = {"full": ((2, 2), (1, 4)), "pruned": ((4, 1), (4, 2))}
SLA = {
    "full": {"sla": True, "sla_skip_distance": [2], "sla_num_skip_groups": 4},
    # Eight groups of which four skip, every second one, so that each rank of four keeps one dead group.
    "pruned": {"sla": True, "sla_skip_distance": [1], "sla_num_skip_groups": 4, "sla_kv_projection": "pruned"},
}
SHAPES = {"full": {"qk_layernorm": True}, "pruned": {"position_embedding_type": "rope", "normalization": "RMSNorm"}}
#: Layer 1's values for all later layers.
VARIANT = {"sla": True, "sla_share": "values", "sla_source_layer": [1], "sla_num_skip_groups": 4}
# Upstream's flag for optimizer state that can be loaded at another tensor-parallel size.
DISTRIBUTED = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}


def _argv(**changes: Any) -> list[str]:
    base = NO_DROPOUT | {"num_attention_heads": 8, "eval_iters": 0, "override_opt_param_scheduler": True}
    return argv(**(base | changes))


def _requests(folder: Path) -> dict[str, dict[str, Any]]:
    requests = {}
    for mode in SLA:
        settings = SLA[mode] | SHAPES[mode] | DISTRIBUTED | {"train_iters": LAST}
        for size in SIZES[mode]:
            # One uninterrupted run, which saves on its way; then one that resumes from there at each size.
            at_size = settings | {"tensor_model_parallel_size": size}
            saves = {"save": folder / f"{mode}{size}", "save_interval": SAVED_AT}
            requests[f"{mode}-{size}"] = {"argv": _argv(**at_size, **saves)}
        for saved_at, size in RESHARDINGS[mode]:
            at_size = settings | {"tensor_model_parallel_size": size}
            loads = {"load": folder / f"{mode}{saved_at}", "ckpt_step": SAVED_AT}
            requests[f"{mode}-{saved_at}-to-{size}"] = {"argv": _argv(**at_size, **loads)}
    return requests


def _setting_requests(folder: Path) -> dict[str, dict[str, Any]]:
    """Loads whose flags agree with the checkpoint's or not.  There is one of an SLA run and one of a dense run."""
    full = SHAPES["full"] | {"train_iters": LAST}
    load = {"load": folder / "sla", "ckpt_step": SAVED_AT}
    dense = {"load": folder / "dense"}
    same, pruned = SLA["full"], SLA["full"] | {"sla_kv_projection": "pruned"}
    settings: dict[str, dict[str, Any]] = {
        "sla": full | same | {"save": folder / "sla", "save_interval": SAVED_AT},
        "dense": full | {"save": folder / "dense", "save_interval": LAST},
        "from-checkpoint-args": full | load | {"use_checkpoint_args": True},
        "no-sla": full | load,
        "other-distance": full | load | same | {"sla_skip_distance": [3]},
        "other-groups": full | load | same | {"sla_num_skip_groups": 2},
        "other-layers": full | load | same | {"sla_layers": "4"},
        "same-layers-spelled-out": full | load | same | {"sla_layers": "3-4"},
        "other-projection": full | load | pruned,
        "checkpoint-args-but-distance": full | load | {"use_checkpoint_args": True, "sla_skip_distance": [3]},
        "dense-to-sla": full | dense | same,
        "finetune-dense-to-sla": full | dense | same | {"finetune": True},
        "finetune-dense-to-beyond": full | dense | {"sla": True, "sla_skip_distance": 4, "finetune": True},
        "finetune-dense-to-dense": full | dense | {"finetune": True},
        "finetune-other-distance": full | load | same | {"sla_skip_distance": [3], "finetune": True},
        "finetune-dense-to-pruned": full | dense | pruned | {"finetune": True},
    }
    settings |= _variant_requests(folder, full) | _newer_requests(folder, full)
    requests = {name: {"argv": _argv(**flags)} for name, flags in (settings | _factor_requests(folder)).items()}
    upstreams = requests["factor-upstreams-32"]
    upstreams["argv"], upstreams["entry"] = [*upstreams["argv"], *CPU_FLAGS], "upstream"
    return requests


def _variant_requests(folder: Path, full: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is shared, and from where, is a checkpoint's setting as any other."""
    load = {"load": folder / "variant", "ckpt_step": SAVED_AT}
    of_before = {"load": folder / "sla", "ckpt_step": SAVED_AT}
    from_args = {"use_checkpoint_args": True}
    return {
        "variant": full | VARIANT | {"save": folder / "variant", "save_interval": SAVED_AT},
        "variant-from-checkpoint-args": full | load | from_args,
        "variant-as-kv": full | load | VARIANT | {"sla_share": None},
        "variant-other-source": full | load | VARIANT | {"sla_source_layer": [2]},
        "variant-checkpoint-args-but-distance": full | load | from_args | {"sla_skip_distance": [1]},
        "kv-as-variant": full | of_before | SLA["full"] | {"sla_share": "keys"},
        "finetune-kv-as-variant": full | of_before | VARIANT | {"finetune": True},
    }


def _newer_requests(folder: Path, full: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Loads from a folder whose non-persistent checkpoint has another distance and is newer than the persistent one."""
    old, new = SLA["full"], SLA["full"] | {"sla_skip_distance": [3]}
    newer = {"non_persistent_ckpt_type": "global"}
    saves = newer | {"save": folder / "newer", "save_interval": SAVED_AT}
    # A run ends with a persistent checkpoint: that one goes elsewhere.
    elsewhere = {"save": folder / "elsewhere", "save_interval": 2 * LAST}
    elsewhere |= {"non_persistent_global_ckpt_dir": folder / "newer" / "non_persistent"}
    load = {"load": folder / "newer"}
    longer = {"train_iters": LAST + 1}
    return {
        "newer-old": full | old | saves | {"train_iters": SAVED_AT},
        "newer-new": full | new | saves | elsewhere | {"non_persistent_save_interval": LAST},
        "newer-load-old": full | old | load | newer,
        "newer-load-new": full | new | load | newer | longer,
        "newer-not-asked-for": full | old | load,
    }


def _factor_requests(folder: Path) -> dict[str, dict[str, Any]]:
    """Runs with ``--rope-scaling-factor``, which upstream stores and does not heed."""
    rope = {"position_embedding_type": "rope", "use_rope_scaling": True, "rotary_base": 1000000, "train_iters": LAST}
    factor = {"rope_scaling_factor": 32.0}
    saved = {name: {"save": folder / name, "save_interval": SAVED_AT} for name in ("ours", "upstreams")}
    ours, upstreams = ({"load": folder / name, "ckpt_step": SAVED_AT} for name in ("ours", "upstreams"))
    return {
        "factor-8": rope,
        "factor-ours-32": rope | factor | saved["ours"],
        "factor-upstreams-32": rope | factor | saved["upstreams"],
        "factor-ours-32-resumed": rope | factor | ours,
        "factor-ours-from-checkpoint-args": {"train_iters": LAST, "use_checkpoint_args": True} | ours,
        "factor-upstreams-from-checkpoint-args": {"train_iters": LAST, "use_checkpoint_args": True} | upstreams,
        "factor-ours-8-resumed": rope | ours,
        "factor-ours-off-resumed": rope | ours | {"use_rope_scaling": None},
        "factor-upstreams-32-resumed": rope | factor | upstreams,
        "factor-upstreams-8-resumed": rope | upstreams,
        "factor-upstreams-32-finetuned": rope | factor | upstreams | {"finetune": True},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return train(_requests(folder), 4, folder / "ranks")


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("settings")
    return train(_setting_requests(folder), 2, folder / "ranks")


@pytest.mark.parametrize(("mode", "size"), [(mode, size) for mode in SIZES for size in SIZES[mode][1:]])
def test_same_training_at_every_size(runs: dict[str, dict[str, Any]], mode: str, size: int) -> None:
    """TP=1, 2 and 4 train the same function from one seed."""
    for what in ("loss", "grad_norm"):
        assert runs[f"{mode}-{size}"][what] == pytest.approx(runs[f"{mode}-1"][what], rel=CLOSE)


@pytest.mark.parametrize(("mode", "saved_at", "size"), [(mode, *pair) for mode in SLA for pair in RESHARDINGS[mode]])
def test_resumes_at_every_size(runs: dict[str, dict[str, Any]], mode: str, saved_at: int, size: int) -> None:
    """Loaded at any size, weights and optimizer state go on as the run that was not interrupted.

    At the size it was saved at, bit for bit: all ranks then add in the same order.
    """
    whole, resumed = runs[f"{mode}-{saved_at}"], runs[f"{mode}-{saved_at}-to-{size}"]
    assert resumed["iteration"] == list(range(SAVED_AT + 1, LAST + 1))
    for what in ("loss", "grad_norm"):
        tolerance = 0 if saved_at == size else CLOSE
        assert resumed[what] == pytest.approx(whole[what][SAVED_AT:], rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("name", "whole"),
    [("from-checkpoint-args", "sla"), ("same-layers-spelled-out", "sla"), ("variant-from-checkpoint-args", "variant")],
)
def test_same_settings_resume(loads: dict[str, dict[str, Any]], name: str, whole: str) -> None:
    """Settings taken from the checkpoint, or equal to its own in other words, resume bit for bit."""
    assert loads[name]["loss"] == loads[whole]["loss"][SAVED_AT:]
    assert loads[name]["num_shared"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-sla", "--sla off: expected on as in the checkpoint"),
        ("other-distance", "--sla-skip-distance 3: expected 2 as in the checkpoint"),
        ("other-groups", "--sla-num-skip-groups 2: expected 4 as in the checkpoint"),
        ("other-layers", "--sla-layers 4: expected 3-4 as in the checkpoint"),
        ("other-projection", "--sla-kv-projection pruned: expected full as in the checkpoint"),
        ("checkpoint-args-but-distance", "--sla-skip-distance 3: expected 2 as in the checkpoint"),
        ("variant-as-kv", "--sla-share kv: expected values as in the checkpoint"),
        ("variant-other-source", "--sla-source-layer 2: expected 1 as in the checkpoint"),
        ("variant-checkpoint-args-but-distance", "--sla-skip-distance 1: expected none as in the checkpoint"),
        ("kv-as-variant", "--sla-share keys: expected kv as in the checkpoint"),
        ("dense-to-sla", "--sla on: expected off as in the checkpoint"),
        ("newer-load-old", "--sla-skip-distance 2: expected 3 as in the checkpoint that is loaded"),
        ("factor-ours-off-resumed", "--use-rope-scaling off: expected on as in the checkpoint that is loaded, or"),
        ("factor-ours-8-resumed", "--rope-scaling-factor 8: expected 32, which the model of the checkpoint has, or"),
        (
            "factor-upstreams-32-resumed",
            "--rope-scaling-factor 32: expected 8, which the model of the checkpoint has (its --rope-scaling-factor 32 "
            "did not reach it: Megatron 0.19 ignores the flag), or --finetune",
        ),
        ("finetune-dense-to-pruned", "--sla-kv-projection pruned: expected off as in the checkpoint"),
    ],
)
def test_other_settings_are_refused(loads: dict[str, dict[str, Any]], name: str, message: str) -> None:
    """A run whose settings differ from its checkpoint's ends with one line that gives both values."""
    assert loads[name]["status"] == 2
    assert loads[name]["loss"] == []
    assert loads[name]["stderr"].startswith(f"sla-megatron: error: {message}")
    assert loads[name]["stderr"].count("\n") == 1


def test_finetune_changes_settings_on_purpose(loads: dict[str, dict[str, Any]]) -> None:
    """``--finetune`` starts SLA from dense weights, or another distance or share from SLA weights, at iteration 1."""
    changed = ("finetune-other-distance", "finetune-kv-as-variant")
    for name in (*changed, "finetune-dense-to-sla", "finetune-dense-to-beyond"):
        assert loads[name]["status"] == 0
        assert loads[name]["iteration"] == list(range(1, LAST + 1))
    # The dense weights did arrive: with a distance beyond the last layer it is the dense model's own continuation.
    assert loads["finetune-dense-to-beyond"]["loss"] == loads["finetune-dense-to-dense"]["loss"]
    assert loads["finetune-dense-to-sla"]["loss"][0] != loads["finetune-dense-to-dense"]["loss"][0]
    assert loads["finetune-dense-to-sla"]["loss"][0] < loads["dense"]["loss"][0]


def test_settings_are_those_of_the_checkpoint_that_is_loaded(loads: dict[str, dict[str, Any]]) -> None:
    """The newest of persistent and non-persistent ones, where the latter are asked for."""
    assert loads["newer-load-new"]["iteration"] == [LAST + 1]
    assert loads["newer-not-asked-for"]["iteration"] == [SAVED_AT + 1, LAST]


def test_the_rope_scaling_factor_reaches_the_model(loads: dict[str, dict[str, Any]]) -> None:
    """It changes the function, dense as with --sla, resumes, and upstream's 32 is 8, which resumes as such."""
    losses = {name: run["loss"] for name, run in loads.items() if name.startswith("factor")}
    assert losses["factor-ours-32"] != losses["factor-8"] == losses["factor-upstreams-32"]
    assert losses["factor-ours-32-resumed"] == losses["factor-ours-32"][SAVED_AT:]
    assert losses["factor-upstreams-8-resumed"] == losses["factor-8"][SAVED_AT:]
    for name, whole in (("ours", "factor-ours-32"), ("upstreams", "factor-8")):
        assert losses[f"factor-{name}-from-checkpoint-args"] == losses[whole][SAVED_AT:]
    changed = loads["factor-upstreams-32-finetuned"]
    assert changed["status"] == 0
    assert (
        "sla-megatron: --rope-scaling-factor 32 replaces 8, which the model of the checkpoint has" in changed["stdout"]
    )
