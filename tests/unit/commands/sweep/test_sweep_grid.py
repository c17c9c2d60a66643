"""A grid's file: the runs it means, and what is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.commands.sweep.equal_parameters import Widths
from sla_megatron.commands.sweep.errors import SweepError
from sla_megatron.commands.sweep.grid import Run, Setting, read_grid
from sla_megatron.commands.sweep.settle import check_runs
from sla_megatron.common.presets import preset_flags
from tests.support.launch import ROOT

# Of Megatron's own making.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:'type' is deprecated:DeprecationWarning")

GRID = """
flags: --global-batch-size 8 --micro-batch-size 2 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 99
  --eval-interval 10 --eval-iters 1 --device cpu
sizes:
  h64-l8: --num-layers 8 --hidden-size 64 --num-attention-heads 4
  gqa: [--num-layers 4 --hidden-size 64, --num-attention-heads 8 --group-query-attention --num-query-groups 2]
context: [16, 32]
tokens: 1_000
seeds: [1, 2]
sla:
  - {distance: [2, 0.75], skip-groups: 0.5}
  - {distances: [[1, 0.5]], skip-groups: 2, kv-projection: pruned, layers: "3-4"}
"""


def runs_of(tmp_path: Path, text: str, *more: str) -> list[Run]:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return read_grid(path, more)


def changed(old: str, new: str) -> str:
    assert GRID.count(old) == 1
    return GRID.replace(old, new)


def test_the_runs(tmp_path: Path) -> None:
    """All of seed 1 first; shares are of each size's layers and groups."""
    names = [run.name for run in runs_of(tmp_path, GRID)]
    large = ["dense", "n2-k2", "n6-k2", "n1+4-k2-in3-4-pruned"]
    # 0.75 of 4 layers, 0.5 of 2 groups.
    small = ["dense", "n2-k1", "n3-k1", "n1+2-k2-in3-4-pruned"]
    expected = [
        f"{size}-c{context}-{setting}-s{seed}"
        for seed in (1, 2)
        for size, settings in (("h64-l8", large), ("gqa", small))
        for context in (16, 32)
        for setting in settings
    ]
    assert names == expected


def test_one_runs_flags(tmp_path: Path) -> None:
    run = next(run for run in runs_of(tmp_path, GRID) if run.name == "gqa-c32-n1+2-k2-in3-4-pruned-s2")
    text = " ".join(run.flags)
    common, _, own = text.partition(" --num-layers 4 ")
    assert common.startswith("--global-batch-size 8 --micro-batch-size 2") and common.endswith("--device cpu")
    assert own == (
        "--hidden-size 64 --num-attention-heads 8 --group-query-attention --num-query-groups 2 --seq-length 32 "
        "--max-position-embeddings 32 --train-iters 4 --seed 2 --sla --sla-skip-distance 1 2 "
        "--sla-num-skip-groups 2 --sla-kv-projection pruned --sla-layers 3-4"
    )
    # 1000 tokens are 3.9 steps of 8 * 32.
    assert (run.iterations, run.tokens) == (4, 1024)


def test_dense_and_sla_differ_in_sla_flags_alone(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, GRID, "--lr", "2")
    dense = {(run.size, run.shape.context, run.seed): run for run in runs if run.setting == Setting()}
    assert len(dense) == 8
    for run in runs:
        compared = dense[run.size, run.shape.context, run.seed]
        assert run.dense_flags == compared.flags and run.tokens == compared.tokens
        assert run.flags[: len(compared.flags)] == compared.flags
        assert all(not word.startswith("--") or word.startswith("--sla") for word in run.flags[len(compared.flags) :])
        assert run.dense_flags.index("--lr", run.dense_flags.index("--lr") + 1) < run.dense_flags.index("--train-iters")


def test_settings_that_round_to_the_same_are_one_run(tmp_path: Path) -> None:
    names = [run.name for run in runs_of(tmp_path, changed("[2, 0.75]", "[6, 0.75, 0.8, 0.01]"))]
    assert len(names) == len(set(names))
    assert [name for name in names if name.startswith("h64-l8-c16-n") and name.endswith("-k2-s1")] == [
        "h64-l8-c16-n6-k2-s1",
        "h64-l8-c16-n1-k2-s1",
    ]


def test_presets_and_contexts_with_flags(tmp_path: Path) -> None:
    text = """
presets: training
flags: --lr-warmup-iters 1
sizes: {gpt2-124m: {presets: gpt2-124m, flags: --lr 1}}
context: {short: {presets: [1k], flags: --global-batch-size 4}, 4k: {presets: [4k]}}
tokens: 2_600_000_000
seeds: 7
sla: [{}]
"""
    runs = runs_of(tmp_path, text)
    # The paper's setting is the default: distance 9 and 9 heads of 12.
    assert [run.name for run in runs] == [
        "gpt2-124m-c1024-dense-s7",
        "gpt2-124m-c1024-n9-k9-s7",
        "gpt2-124m-c4096-dense-s7",
        "gpt2-124m-c4096-n9-k9-s7",
    ]
    flags = runs[0].flags
    training, model = preset_flags("training"), preset_flags("gpt2-124m")
    assert flags[: len(training)] == training and "--bf16" in training
    assert flags[len(training) :][: 2 + len(model) + 2] == ("--lr-warmup-iters", "1", *model, "--lr", "1")
    assert runs[0].tokens - 4 * 1024 < 2_600_000_000 <= runs[0].tokens


def test_dense_false(tmp_path: Path) -> None:
    assert all(not run.setting.is_dense for run in runs_of(tmp_path, GRID + "dense: false\n"))


FAMILY = (
    changed(GRID[GRID.index("sla:") :], "")
    + """
sla:
  - {name: kept, share: [kv, values, keys], skip-groups: 0.5}
  - {source: [1, 0.5], share: values, skip-groups: 0.5, kv-projection: [full, pruned], parameters: dense}
  - {sources: [[1, 0.5]], skip-groups: 1.0}
  - {distance: 1, skip-groups: 1.0, layers: 2-/2, kv-projection: pruned}
"""
)


def test_a_family(tmp_path: Path) -> None:
    runs = [run for run in runs_of(tmp_path, FAMILY) if run.size == "h64-l8" and run.shape.context == 16]
    assert [run.setting.name for run in runs if run.seed == 1] == [
        *("dense", "n6-k2", "n6-k2-values", "n6-k2-keys"),
        *("from1-k2-values", "from1-k2-values-pruned-ffn270", "from4-k2-values", "from4-k2-values-pruned-ffn264"),
        *("from1+4-k4", "n1-k4-in2-by2-pruned"),
    ]
    assert [run.setting.label for run in runs[:5]] == [None, "kept", "kept", "kept", None]
    flags = {run.setting.name: " ".join(run.setting.flags) for run in runs}
    assert flags["n6-k2"] == "--sla --sla-skip-distance 6 --sla-num-skip-groups 2 --sla-kv-projection full"
    assert flags["n6-k2-keys"] == f"{flags['n6-k2']} --sla-share keys"
    assert flags["from1-k2-values-pruned-ffn270"] == (
        "--sla --sla-source-layer 1 --sla-num-skip-groups 2 --sla-kv-projection pruned --sla-share values "
        "--ffn-hidden-size 270"
    )
    assert "--sla-source-layer 1 4 " in flags["from1+4-k4"] and flags["n1-k4-in2-by2-pruned"].endswith("-layers 2-/2")


def test_a_name_makes_no_run_another(tmp_path: Path) -> None:
    """A grid may be given names while its runs are under way."""
    assert runs_of(tmp_path, FAMILY) == runs_of(tmp_path, FAMILY.replace("name: kept", "name: given later"))


@pytest.mark.parametrize(
    ("flags", "width"),
    [
        # In layers 2-8 two values of 16 rows are dead, of 64 weights and a bias: 14 * 16 * 65 = 14,560 parameters.  One
        # unit of all eight MLPs has two times 64 weights and a bias: 1,032.
        ("", 256 + 14),
        ("--ffn-hidden-size 100", 100 + 14),
        ("--kv-channels 32", 256 + 28),
        # 14 * 16 * 64 = 14,336 parameters; a unit has 8 * 128 = 1,024, and gated 8 * 192 = 1,536: 9.3 of these.
        ("--disable-bias-linear", 256 + 14),
        ("--disable-bias-linear --swiglu --ffn-hidden-size 176", 176 + 9),
        # Ranks share it out evenly: 185.3 is nearer to 186 than to 184.
        ("--disable-bias-linear --swiglu --ffn-hidden-size 176 --tensor-model-parallel-size 2", 186),
    ],
)
def test_the_width_at_equal_parameters(flags: str, width: int, tmp_path: Path) -> None:
    text = FAMILY.replace("--lr 1e-3", f"--lr 1e-3 {flags}")
    runs = [run for run in runs_of(tmp_path, text) if run.size == "h64-l8" and run.setting.sources == (1,)]
    assert {run.setting.ffn_hidden_size for run in runs} == {None, width}
    check_runs(runs)


def test_a_norm_of_keys_that_no_layer_has(tmp_path: Path) -> None:
    """All four keys and values of layers 5-8 are dead, and with them a norm of 16 weights and 16 biases."""
    widths = Widths.of_flags("here", ["--hidden-size", "64", "--qk-layernorm"], num_heads=4)
    half = SLAConfig(8, 4, (), 4, kv_projection="pruned", source_layers=(4,))
    assert (widths.kv_channels, widths.qkv_bias, widths.key_norm) == (16, True, 32)
    assert half.dead_parameters(16, 65, 32) == 4 * (2 * 4 * 16 * 65 + 32)


REFUSED = {
    "seed: 1\n": "seed: 1: expected one of the keys presets, flags, sizes, context, tokens, seeds, sla, dense",
    "seeds: [3]\n": "seeds comes twice: expected YAML",
    "dense: 1\n": "dense: 1: expected true or false",
}
CHANGED = {
    ("tokens: 1_000", "tokens: 2e6"): "tokens: 2e6: expected a count such as 2_000_000",
    ("tokens: 1_000", "tokens: -1"): "tokens: -1: expected a count",
    ("tokens: 1_000", ""): "tokens: nothing: expected a count",
    ("seeds: [1, 2]", "seeds: [1, 1]"): "seeds: [1, 1]: expected 1 once",
    ("seeds: [1, 2]", "seeds: [true]"): "seeds: True: expected counts",
    ("seeds: [1, 2]", "seeds: []"): "seeds: nothing: expected a value",
    ("[16, 32]", "[16, x]"): "context: x: expected counts of tokens",
    ("[2, 0.75]", "[1.5]"): "sla[0].distance: 1.5: expected a count of 1 or more, or a share such as 0.75",
    ("[2, 0.75]", "0"): "sla[0].distance: 0: expected a count",
    ("[[1, 0.5]]", "[1, 2]"): "sla[1].distances: [1, 2]: expected a list of lists",
    ("distances: [[1, 0.5]]", "distance: 1, distances: [[1]]"): "sla[1].distances: [[1]]: expected no distance",
    ("skip-groups: 0.5", "skip-groups: 3"): "sla[0].skip-groups: 3: expected at most 2, the K/V groups of size gqa",
    ("skip-groups: 0.5", "heads: 3"): "sla[0].heads: 3: expected one of the keys distance, distances, source, sources",
    ("skip-groups: 0.5", "source: 1"): "sla[0].source: 1: expected no distance beside it",
    ("distances: [[1, 0.5]]", "sources: [[1]], source: 1"): "sla[1].sources: [[1]]: expected no source beside it",
    ("distance: [2, 0.75]", "source: [0.5, 5]"): "sla[0].source: 5: expected at most 4, the layers",
    (
        "distance: [2, 0.75]",
        "source: 1.5",
    ): "sla[0].source: 1.5: expected a count of 1 or more, or a share such as 0.75",
    ("distance: [2, 0.75]", "source: 0"): "sla[0].source: 0: expected a count",
    ("distances: [[1, 0.5]]", "sources: 1"): "sla[1].sources: [1]: expected a list of lists",
    ("skip-groups: 0.5", "share: [kv, both]"): "sla[0].share: both: expected kv or values or keys",
    ("skip-groups: 0.5", "parameters: 4"): "sla[0].parameters: 4: expected dense, or no sla[0].parameters",
    ("skip-groups: 0.5", "name: [a]"): "sla[0].name: ['a']: expected a name for reports",
    ("skip-groups: 0.5", "name: ''"): "sla[0].name: : expected a name for reports",
    ("pruned", "none"): "sla[1].kv-projection: none: expected full or pruned",
    ('"3-4"', "last"): "sla[1].layers: last: expected layers such as 5-8",
    ("h64-l8:", "a/b:"): "sizes: a/b: expected a name of letters",
    ("--lr 1e-3", "--seed 3"): "flags.flags: --seed: expected seeds",
    ("--lr 1e-3", "--sla-layers=3"): "flags.flags: --sla-layers=3: expected sla",
    ("--lr 1e-3", "--save x"): "flags.flags: --save: expected --save-interval alone",
    ("--lr 1e-3", "--lr '1"): "expected words as in a shell",
    ("--global-batch-size 8", "--lr 1"): "size h64-l8: --global-batch-size: expected the flag with a count",
    ("--global-batch-size 8", "--global-batch-size x"): "--global-batch-size x: expected the flag with a count",
    ("flags: --global", "presets: gpt3\nflags: --global"): "presets: no preset gpt3; there are 13b ",
    ("flags: --global", "flags: x --global"): "flags.flags: x: expected Megatron's flags",
}


NOT_WIDENED = {
    "--num-experts 2": "sla[1].parameters: dense: expected a GPT without --num-experts",
    "--hybrid-layer-pattern=*-": "sla[1].parameters: dense: expected a GPT without --hybrid-layer-pattern",
    "--swiglu": "sla[1].parameters: dense: expected --ffn-hidden-size beside --swiglu, whose default is rounded",
    "--kv-channels x": "sla[1].parameters: --kv-channels x: expected the flag with a count",
}


@pytest.mark.parametrize("flags", NOT_WIDENED)
def test_models_whose_width_is_not_counted(flags: str, tmp_path: Path) -> None:
    refused(tmp_path, FAMILY.replace("--lr 1e-3", f"--lr 1e-3 {flags}"), NOT_WIDENED[flags])


@pytest.mark.parametrize("line", REFUSED)
def test_refused_lines(line: str, tmp_path: Path) -> None:
    refused(tmp_path, GRID + line, REFUSED[line])


@pytest.mark.parametrize("change", CHANGED, ids=" -> ".join)
def test_refused_values(change: tuple[str, str], tmp_path: Path) -> None:
    refused(tmp_path, changed(*change), CHANGED[change])


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "sizes: {1: 2}: 3", "? [1]\n: 2"])
def test_what_is_no_grid(text: str, tmp_path: Path) -> None:
    refused(tmp_path, text, "expected ")


def refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SweepError) as error:
        runs_of(tmp_path, text)
    said = str(error.value)
    assert said.startswith(str(tmp_path / "grid.yaml")) and message in said and "\n" not in said


def test_a_grid_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="No such file or directory: expected a YAML file"):
        read_grid(tmp_path / "none.yaml")


def test_megatron_accepts_the_grid(tmp_path: Path) -> None:
    check_runs(runs_of(tmp_path, GRID))
    check_runs(runs_of(tmp_path, FAMILY))


def test_megatron_has_a_word_on_the_width(tmp_path: Path) -> None:
    run = next(run for run in runs_of(tmp_path, FAMILY) if run.setting.ffn_hidden_size)
    with pytest.raises(SweepError, match=rf"{run.name}: ffn_hidden_size \d+ is 256 to Megatron: expected the same"):
        check_runs([replace(run, flags=run.flags[:-2])])


def test_of_a_hybrid_model_attention_layers_count(tmp_path: Path) -> None:
    """Four of nine, of which three quarters are three."""
    text = changed("--num-layers 8 --hidden-size 64", "--hidden-size 64 --hybrid-layer-pattern=-*-*-*--*")
    text = text.replace("[1, 2]\n", "1\n").replace("context: [16, 32]", "context: 16")
    runs = [run for run in runs_of(tmp_path, text) if run.size == "h64-l8"]
    assert [run.setting.distances for run in runs] == [(), (2,), (3,), (1, 2)]
    check_runs(runs)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("--lr 1e-3", "--lr 1e-3 --no-such-flag 3", "--no-such-flag 3: expected a known flag"),
        (
            "h64-l8: --num-layers 8 --hidden-size 64",
            "x: --num-layers 8 --hidden-size 66",
            "does not accept these flags",
        ),
        ("--eval-iters 1", "--eval-iters 0", "--eval-iters 0: expected 1 or more, for a loss to compare"),
        ("--lr 1e-3", "--lr 1e-3 --hybrid-context-parallel", "expected no --hybrid-context-parallel"),
        ('"3-4"', '"1-2"', "--sla-layers 1-2: expected layers beyond the distance 1: 2-8"),
        ("--lr 1e-3", "--lr 1e-3 --fp8-format hybrid", "--fp8-format hybrid: expected no fp8 without a GPU"),
    ],
)
def test_megatron_refuses_in_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SweepError) as error:
        check_runs(runs_of(tmp_path, changed(old, new)))
    said = str(error.value)
    assert message in said and "\n" not in said and said.split(":")[0].startswith(("h64-l8-c16", "x-c16"))


@pytest.mark.parametrize("name", ["paper", "paper-growth", "cpu", "tiny", "methods"])
def test_the_examples_are_accepted(name: str) -> None:
    runs = read_grid(ROOT / "examples" / "sweep" / f"{name}.yaml")
    check_runs(runs)
    assert len({run.setting for run in runs}) > 1 and len({run.seed for run in runs}) > 1
