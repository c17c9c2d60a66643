"""``sla-plan`` where Megatron is not installed: its own table of flags against Megatron's parser and validation."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sla_megatron.commands.plan import cli, settle, without_megatron
from sla_megatron.commands.plan.job import Job
from sla_megatron.commands.plan.known_flags import add_known_flags
from sla_megatron.common.errors import StartError
from sla_megatron.common.presets import preset_flags

Settled = Callable[[list[str]], Job]

# Of Megatron's own making.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore:'type' is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("sources_parsed_once"),
]

SMALL = (
    "--sla --num-layers 12 --hidden-size 96 --num-attention-heads 12 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 2"
)
PP2, PP3, PP4 = (f"--pipeline-model-parallel-size {size} --global-batch-size 48" for size in (2, 3, 4))
GQA = "--group-query-attention --num-query-groups 4"
EXPERTS = "--num-experts 8 --disable-bias-linear"

#: Beside SMALL.
PLANS = {
    "nothing else": "",
    "bf16": "--bf16 --num-gpus 4",
    "fp16": f"--fp16 {PP2}",
    "grouped queries": f"{GQA} --tensor-model-parallel-size 2 {PP2}",
    "groups that are not asked for": f"--num-query-groups 4 {PP2}",
    "head size": f"--kv-channels 16 --hidden-size 100 {PP2}",
    "swiglu": f"--swiglu --disable-bias-linear --normalization RMSNorm {PP2} --vocab-size 1000",
    "swiglu of a given size": f"--swiglu --ffn-hidden-size 100 --add-qkv-bias --qk-layernorm {PP2}",
    "rotated positions": f"--position-embedding-type rope --rotary-base 500000 {PP2} --vocab-size 1000",
    "no positions": f"--position-embedding-type none --qk-layernorm {PP2} --vocab-size 1000",
    "untied": f"--untie-embeddings-and-output-weights --vocab-size 1000 --make-vocab-size-divisible-by 64 {PP2}",
    "padded": f"--padded-vocab-size 1024 --tokenizer-type NullTokenizer {PP2}",
    "vocabulary that no flag tells": f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model any {PP2}",
    "stages of layers": f"{PP2} --num-layers-per-virtual-pipeline-stage 3",
    "stages a rank": f"{PP2} --num-virtual-stages-per-pipeline-rank 3",
    "one stage a rank": f"{PP4} --num-virtual-stages-per-pipeline-rank 1",
    "groups of microbatches": f"{PP2} --num-layers-per-virtual-pipeline-stage 2 "
    "--microbatch-group-size-per-virtual-pipeline-stage 4",
    "no overlap": f"{PP3} --num-virtual-stages-per-pipeline-rank 2 --no-overlap-p2p-communication",
    "overlap at both ends": f"{PP3} --num-virtual-stages-per-pipeline-rank 2 --overlap-p2p-communication-warmup-flush",
    "given ends": f"{PP4} --decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 4",
    "one given end": f"{PP3} --decoder-last-pipeline-num-layers 2 --num-virtual-stages-per-pipeline-rank 1",
    "given ends and stages": f"{PP3} --decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 2 "
    "--num-virtual-stages-per-pipeline-rank 2",
    "counted ends": f"{PP2} --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    "counted embedding and stages": f"{PP2} --num-layers 11 --account-for-embedding-in-pipeline-split "
    "--num-layers-per-virtual-pipeline-stage 3",
    "context parallel": f"--context-parallel-size 2 {PP2} --num-gpus 8",
    "sequence parallel": f"--tensor-model-parallel-size 3 --sequence-parallel {PP2} --vocab-size 1000",
    "sequence parallel on one rank": f"--sequence-parallel {PP2}",
    "recomputed layers": f"{PP2} --recompute-granularity full --recompute-method block --recompute-num-layers 2",
    "recomputed attention": f"{PP2} --recompute-activations",
    "experts": f"{EXPERTS} {PP2} --expert-model-parallel-size 4 --vocab-size 1000",
    "experts of their own size": f"{EXPERTS} {PP2} --moe-ffn-hidden-size 50 --moe-router-topk 3 --swiglu "
    "--moe-shared-expert-intermediate-size 20 --expert-tensor-parallel-size 1 --vocab-size 1000",
    "pruned": f"{PP2} --sla-kv-projection pruned --vocab-size 1000",
    "the other reading": f"{PP2} --sla-skip-distance 1 --sla-layers 4-12",
    "shares": f"{PP2} --sla-skip-distance 0.5 0.25 --sla-num-skip-groups 0.5",
    "a source": f"{PP2} --sla-share values --sla-source-layer 1 --sla-num-skip-groups 6",
    "keys": f"{PP4} {GQA} --sla-share keys --sla-layers 6-/2 --sla-skip-distance 5",
}
PRESETS = (
    *("gpt2-124m 1k sla", "gpt2-350m 4k sla-pruned", "gpt2-124m-8e 1k sla", "1b 8k sla recompute", "7b 4k sla"),
    *("7b 16k-cp2 cla2", "13b 4k half-shared", "8x7b 4k sla", "gpt2-774m 2k skipv1"),
)

#: What neither accepts, beside SMALL -> a word of the line that says so without Megatron.
REFUSED = {
    "--num-attention-heads 10": "--hidden-size 96",
    "--tensor-model-parallel-size 5": "--num-attention-heads 12",
    "--group-query-attention --num-query-groups 3 --tensor-model-parallel-size 2": "--tensor-model-parallel-size 2",
    "--context-parallel-size 3": "--seq-length 64",
    "--max-position-embeddings 32": "--max-position-embeddings 32",
    "--pipeline-model-parallel-size 5": "--num-layers 12",
    "--num-layers-per-virtual-pipeline-stage 2": "--pipeline-model-parallel-size 1",
    f"{PP2} --num-layers-per-virtual-pipeline-stage 4": "--num-layers-per-virtual-pipeline-stage 4",
    f"{PP2} --num-virtual-stages-per-pipeline-rank 4": "--num-virtual-stages-per-pipeline-rank 4",
    f"{PP2} --num-virtual-stages-per-pipeline-rank 3 --num-layers-per-virtual-pipeline-stage 2": "alone",
    f"{PP2} --num-virtual-stages-per-pipeline-rank 3 --no-overlap-p2p-communication": "3 or more",
    f"{PP2} --overlap-p2p-communication-warmup-flush": "--overlap-p2p-communication-warmup-flush",
    f"{PP3} --decoder-first-pipeline-num-layers 3": "--num-layers 12",
    f"{PP2} --decoder-first-pipeline-num-layers 3 --account-for-loss-in-pipeline-split": "--num-layers 12",
    f"{PP2} --account-for-loss-in-pipeline-split": "--num-layers 12",
    "--bf16 --fp16": "--fp16",
    "--recompute-granularity full": "--recompute-method",
    "--recompute-granularity full --recompute-method uniform": "--recompute-num-layers",
    "--recompute-granularity selective --recompute-method uniform": "--recompute-method",
    "--expert-model-parallel-size 2": "--expert-model-parallel-size 2",
    "--moe-ffn-hidden-size 20": "--moe-ffn-hidden-size 20",
    f"{EXPERTS} --expert-model-parallel-size 3": "--num-experts 8",
    f"{EXPERTS} --moe-router-topk 1": "--moe-router-topk 1",
    "--num-experts 8 --expert-tensor-parallel-size 2 --tensor-model-parallel-size 2": "--expert-tensor-parallel-size 2",
    f"{PP2} --num-gpus 3": "--num-gpus 3",
    f"{PP4} --num-virtual-stages-per-pipeline-rank 3 --num-gpus 20 --global-batch-size 30": "--global-batch-size 30",
    "--sla-kv-projection pruned --tensor-model-parallel-size 2 --sla-num-skip-groups 5": "--sla-kv-projection pruned",
}


@pytest.fixture
def with_megatron(monkeypatch: pytest.MonkeyPatch) -> Settled:
    """A function from flags to the job that Megatron makes of them."""

    def settled(argv: list[str]) -> Job:
        monkeypatch.setattr(sys, "argv", ["sla-plan", *argv])
        return settle.settled_job()

    return settled


@pytest.mark.parametrize("flags", PLANS.values(), ids=PLANS)
def test_the_job_is_the_one_that_megatron_makes_of_the_flags(flags: str, with_megatron: Settled) -> None:
    argv = f"{SMALL} {flags}".split()
    assert without_megatron.settled_job(argv) == with_megatron(argv)


def test_so_it_is_of_the_readmes_command(with_megatron: Settled) -> None:
    readme = (Path(__file__).resolve().parents[4] / "README.md").read_text()
    (command,) = re.findall(r"^```sh\nsla-plan (.*?)^```", readme, re.MULTILINE | re.DOTALL)
    argv = command.replace("\\\n", "").split()
    assert without_megatron.settled_job(argv) == with_megatron(argv)


@pytest.mark.parametrize("names", PRESETS)
def test_so_it_is_of_presets(names: str, with_megatron: Settled) -> None:
    argv = list(preset_flags(names))
    assert without_megatron.settled_job(argv) == with_megatron(argv)


@pytest.mark.parametrize(("flags", "word"), REFUSED.items(), ids=REFUSED)
def test_what_megatron_refuses_is_refused(flags: str, word: str, with_megatron: Settled) -> None:
    argv = f"{SMALL} {flags}".split()
    with pytest.raises(StartError):
        with_megatron(argv).require_runnable()
    with pytest.raises(StartError) as found:
        without_megatron.settled_job(argv).require_runnable()
    assert word in found.value.reason and "\n" not in found.value.reason


def test_names_types_and_defaults_are_megatrons(megatron: None) -> None:
    """Of each flag of the table: its attribute, how many words it takes, its default, and choices of Megatron's."""
    from megatron.training.arguments import add_megatron_arguments

    theirs = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._option_string_actions
    for action in add_known_flags(argparse.ArgumentParser(add_help=False))._actions:
        (flag,) = action.option_strings
        their = theirs[flag]
        # Several words are one here: of a flag that is passed over.
        assert (action.nargs, their.nargs) in {(None, None), (0, 0), (None, "+")}, flag
        if action.default != argparse.SUPPRESS:
            assert (action.dest, action.default, action.const) == (their.dest, their.default, their.const), flag
            assert set(action.choices or ()) <= set(their.choices or ()), flag
            assert (action.metavar == "N") == (their.type is int), flag


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--hybrid-layer-pattern *-*-", "--hybrid-layer-pattern *-*-: needs Megatron"),
        ("--mtp-num-layers 1", "--mtp-num-layers 1: needs Megatron"),
        ("--core-attention sdpa", "--core-attention sdpa: needs Megatron"),
        ("--squared-relu", "--squared-relu: needs Megatron"),
        ("--no-such-flag", "--no-such-flag: needs Megatron"),
        ("--position-embedding-type yarn", "--position-embedding-type yarn: expected one of "),
        ("--num-layers 0", "--num-layers 0: expected an integer >= 1"),
        ("--hidden-size x", "--hidden-size x: expected an integer >= 1"),
        ("--bf16 3", "3: expected a flag before it"),
        ("--device tpu", "--device tpu: expected one of auto, cpu, cuda"),
    ],
)
def test_what_no_table_says_ends_in_one_line(
    flags: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli, "megatron_origin", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sla-plan", *SMALL.split(), *flags.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said.startswith("sla-plan: Megatron is not installed")
    assert error.startswith(f"sla-plan: error: {line}")
    assert ("pip install 'megatron-core[training]" in error) == ("needs Megatron" in line)


@pytest.mark.parametrize("flag", ["--num-layers", "--hidden-size", "--seq-length", "--micro-batch-size"])
def test_what_every_run_needs_is_asked_for(flag: str, with_megatron: Settled) -> None:
    words = SMALL.split()
    del words[words.index(flag) : words.index(flag) + 2]
    with pytest.raises(StartError):
        with_megatron(words)
    with pytest.raises(StartError) as found:
        without_megatron.settled_job(words)
    assert found.value.reason == f"{flag} without a value: expected an integer >= 1"
