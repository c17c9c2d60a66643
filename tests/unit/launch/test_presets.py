"""The presets in ``launch/presets``: every combination is a run that Megatron accepts, of the size in its name."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from io import StringIO

import pytest
import torch

from sla_megatron.common.presets import preset_flags
from tests.support.launch import ROOT

# Of Megatron's own making.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore:'type' is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("sources_parsed_once"),
]

PRESETS = ROOT / "launch" / "presets"
LAUNCH_README = (ROOT / "launch" / "README.md").read_text()

#: Parameters that the name says.
MODELS = {"gpt2-124m": 124e6, "gpt2-350m": 350e6, "gpt2-774m": 774e6, "1b": 1e9, "7b": 7e9, "13b": 13e9}
#: Their experts are counted too.
MODELS |= {"gpt2-124m-8e": 520e6, "8x7b": 46.7e9}
#: A hybrid model -> the GPT that it is.
HYBRIDS = {f"{model}-hybrid": model for model in ("gpt2-124m", "gpt2-350m", "gpt2-774m")}
CONTEXTS = {"1k": 1024, "2k": 2048, "4k": 4096, "8k": 8192, "16k": 16384, "16k-cp2": 16384}
VARIANTS = ("", "sla", "sla-pruned")

TOKENS_A_STEP = 2**19


@cache
def preset(name: str) -> tuple[str, ...]:
    """The arguments of one preset."""
    return tuple(preset_flags(name))


def flags_of(names: str) -> list[str]:
    """The flags of presets, with what a run brings along."""
    vocabulary = 50257 if names.startswith("gpt2") else 32000
    brought = f"--mock-data --tokenizer-type NullTokenizer --vocab-size {vocabulary} --train-iters 3000"
    return [*(word for name in names.split() for word in preset(name)), *brought.split()]


def num_gpus(model: str) -> int:
    """The GPUs that a preset is meant for, as its comment says."""
    return int(re.search(r"^# gpus: (\d+)\b", (PRESETS / f"{model}.flags").read_text(), flags=re.MULTILINE)[1])


def table(heading: str) -> dict[str, dict[str, str]]:
    """The README's table whose first column is ``heading``: first cell -> column -> cell."""
    (block,) = re.findall(rf"^\| {heading} \|.*\n(?:\|.*\n)+", LAUNCH_README, flags=re.MULTILINE)
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return {row[0].strip("`"): dict(zip(header, row, strict=True)) for row in rows}


@pytest.fixture
def settle(megatron: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Namespace]:
    """A function from flags and a number of GPUs to Megatron's settled arguments, as of a run on such GPUs."""
    from sla_megatron.cpu.device import add_device_arg
    from sla_megatron.flags.arguments import settled_args
    from sla_megatron.flags.entry_point import require_pretraining

    def run(flags: list[str], gpus: int) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *flags])
        monkeypatch.setenv("WORLD_SIZE", str(gpus))
        with redirect_stdout(StringIO()):
            return settled_args(add_device_arg, check=require_pretraining, will_run_here=False)

    return run


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("model", MODELS)
def test_combination(
    settle: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch, model: str, context: str, variant: str
) -> None:
    """Megatron and we accept it on the GPUs it is meant for, and ``sla-plan`` finds a schedule for it."""
    flags, gpus = flags_of(f"{model} {context} {variant}"), num_gpus(model)
    args = settle(flags, gpus)
    assert args.context_parallel_size == (2 if context == "16k-cp2" else 1)
    length = CONTEXTS[context]
    assert (args.seq_length, args.max_position_embeddings) == (length, length)
    assert args.seq_length * args.global_batch_size == TOKENS_A_STEP
    assert args.seq_length * args.micro_batch_size == max(8192, length)
    assert (args.bf16, args.use_distributed_optimizer) == (True, True)
    assert (args.attention_dropout, args.hidden_dropout) == (0, 0)
    assert args.sla == bool(variant)
    if not variant:
        return
    # Three quarters of the layers and of the groups.
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    assert (args.sla_skip_distance, args.sla_num_skip_groups) == ([args.num_layers * 3 // 4], groups * 3 // 4)
    assert args.sla_kv_projection == ("pruned" if variant == "sla-pruned" else "full")

    from sla_megatron.commands.plan.settle import settled_job
    from sla_megatron.commands.plan.traffic import totals

    monkeypatch.setattr(sys, "argv", ["sla-plan", *flags, "--num-gpus", str(gpus)])
    job = settled_job()
    job.require_runnable()
    # The presets' virtual stages are chosen so that no K/V leave their rank.
    assert totals(job).kv == 0


#: What the presets of other methods settle to, with ``L`` layers and ``G`` K/V groups.
NAMED = {
    "skipv1": lambda layers, groups: ("values", None, [1], groups // 2, None),
    "cla2": lambda layers, groups: ("kv", [1], None, groups, ",".join(map(str, range(2, layers + 1, 2)))),
    "half-shared": lambda layers, groups: ("kv", None, [layers // 2], groups, None),
}


@pytest.mark.parametrize("setting", NAMED)
@pytest.mark.parametrize("model", [*MODELS, *HYBRIDS])
def test_a_named_setting(
    settle: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch, model: str, setting: str
) -> None:
    """It fits every model, dead projections left out too, and ``sla-plan`` finds a schedule for it."""
    from sla_megatron.commands.plan.settle import settled_job
    from sla_megatron.flags.skipping import num_attention_layers, num_query_groups

    flags, gpus = flags_of(f"{model} 4k {setting}"), num_gpus(model)
    args = settle([*flags, "--sla-kv-projection", "pruned"], gpus)
    names = ("share", "skip_distance", "source_layer", "num_skip_groups", "layers")
    expected = NAMED[setting](num_attention_layers(args), num_query_groups(args))
    assert tuple(getattr(args, f"sla_{name}") for name in names) == expected

    monkeypatch.setattr(sys, "argv", ["sla-plan", *flags, "--num-gpus", str(gpus)])
    settled_job().require_runnable()


@pytest.mark.parametrize("model", HYBRIDS)
def test_a_hybrid_model_is_the_gpt(settle: Callable[..., Namespace], model: str) -> None:
    """All else is as the GPT has it: an attention layer and an MLP layer for each of its layers."""
    hybrid, gpt = (vars(settle(flags_of(f"{name} 16k sla-pruned"), 8)) for name in (model, HYBRIDS[model]))
    depth = gpt["num_layers"]
    assert {name: value for name, value in hybrid.items() if gpt[name] != value} == {
        "num_layers": 2 * depth,
        "encoder_num_layers": 2 * depth,
        "hybrid_layer_pattern": "*-" * depth,
    }
    # The distance and the layers of SLA are counted in layers of attention, as in the GPT.
    assert hybrid["sla_skip_distance"] == [depth * 3 // 4]


@pytest.mark.parametrize("model", MODELS)
def test_readme_says_what_the_model_is(settle: Callable[..., Namespace], model: str) -> None:
    """Each cell of the README's table is what the flags settle to."""
    args, row = settle(flags_of(f"{model} 1k"), num_gpus(model)), table("model")[model]
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    settled = {
        "layers": args.num_layers,
        "hidden": args.hidden_size,
        "heads": args.num_attention_heads,
        "K/V groups": groups,
        "GPUs": num_gpus(model),
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "layers a virtual stage": args.num_layers_per_virtual_pipeline_stage or "-",
        "EP": args.expert_model_parallel_size,
    }
    assert {name: row[name] for name in settled} == {name: str(value) for name, value in settled.items()}


def test_readme_lists_every_preset() -> None:
    """Models and contexts in their tables, the rest in words."""
    assert list(table("model")) == list(MODELS)
    assert {name: int(row["tokens a sample"]) for name, row in table("context").items()} == CONTEXTS
    for name, row in table("context").items():
        split = () if row["CP"] == "1" else ("--context-parallel-size", row["CP"])
        assert preset(name)[4:] == (
            *("--micro-batch-size", row["samples a microbatch"]),
            *("--global-batch-size", row["samples a step"]),
            *split,
        )
    for file in PRESETS.glob("*.flags"):
        assert f"`{file.stem}`" in LAUNCH_README, file.name


@pytest.mark.parametrize("presets", ["13b 16k sla recompute", "13b 8k sla-pruned recompute", "gpt2-124m 16k recompute"])
def test_recomputation_and_eight_gpus(settle: Callable[..., Namespace], presets: str) -> None:
    """What the README recommends where memory is short."""
    assert settle(flags_of(presets), 8).recompute_granularity == "full"


def test_pruned_with_other_tensor_parallel_sizes(settle: Callable[..., Namespace]) -> None:
    """The README's example is right, and needed."""
    from sla_megatron.common.errors import FlagError

    flags = [*flags_of("13b 4k sla-pruned"), "--tensor-model-parallel-size", "4"]
    with pytest.raises(FlagError, match="divisible by TP"):
        settle(flags, 16)
    assert settle([*flags, "--sla-num-skip-groups", "28"], 16).sla_num_skip_groups == 28


def test_arguments_win_over_presets(settle: Callable[..., Namespace]) -> None:
    """Whatever a preset sets with a value can be set otherwise behind it."""
    model = settle(flags_of("7b 4k sla"), 8)
    changed = settle([*flags_of("7b 4k sla"), "--lr", "1e-3", "--seq-length", "2048", "--global-batch-size", "1024"], 8)
    assert (model.lr, model.seq_length, model.global_batch_size) == (3e-4, 4096, 128)
    assert (changed.lr, changed.seq_length, changed.global_batch_size) == (1e-3, 2048, 1024)


def test_parameters_are_those_of_the_name() -> None:
    """Of the model that Megatron builds, within 10 %; with ``sla`` as many as dense, with ``sla-pruned`` fewer."""
    from sla_megatron.commands.convert.megatron_model import args_of, build, megatron_alone

    def parameters(names: str) -> int:
        flags = flags_of(names)
        # The whole model in this process.
        if (stage := "--num-layers-per-virtual-pipeline-stage") in flags:
            del flags[flags.index(stage) : flags.index(stage) + 2]
        flags += ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
        flags += ["--expert-model-parallel-size", "1"]
        args = args_of(flags, torch.float32)
        # Without memory, since on this device there is nothing but shapes.
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build(args).parameters())

    with megatron_alone():
        found = {(model, names): parameters(f"{model} {names}") for model in MODELS for names in ("1k", "16k")}
        for model in HYBRIDS:
            assert parameters(f"{model} 1k") == found[HYBRIDS[model], "1k"]
        for model, size in MODELS.items():
            assert found[model, "1k"] == pytest.approx(size, rel=0.1)
            assert found[model, "16k"] == pytest.approx(size, rel=0.1)
            assert parameters(f"{model} 1k sla") == found[model, "1k"]
            assert 0.9 * size < parameters(f"{model} 1k sla-pruned") < found[model, "1k"]
            stated = table("model")[model]["parameters"]
            scale = 1e6 if stated.endswith("M") else 1e9
            assert float(stated[:-1]) == pytest.approx(found[model, "1k"] / scale, rel=0.01)
