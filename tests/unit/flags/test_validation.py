"""Flags, as a user types them: a refusal is one line before anything happens, the rest resolves."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sla_megatron.common.errors import FlagError, one_line_errors
from sla_megatron.cpu.device import megatron_device

from .flag_tables import BAD, GOOD, MODEL, SETTLED

#: Upstream's validation warns of much, and Python deprecates an option that its parser uses.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:'type' is deprecated:DeprecationWarning")


@dataclass
class Run:
    """How Megatron's parsing with the ``--sla`` flags went."""

    args: Namespace | None
    status: int
    out: str
    err: str


@pytest.fixture
def settle(
    megatron: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> Callable[..., Run]:
    """A function from a command line to how it went; checks that nothing was started, set or written."""
    from sla_megatron.cpu.device import add_device_arg
    from sla_megatron.flags import arguments, entry_point

    settled: list[Namespace] = []
    monkeypatch.setattr(arguments, "set_global_variables", settled.append)
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)

    def run(command_line: str, world_size: int = 1, rank: int = 0) -> Run:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *MODEL.split(), *command_line.split()])
        settled.clear()
        capsys.readouterr()
        args, status = None, 0
        try:
            args = arguments.parse_and_validate_args(add_device_arg, check=entry_point.require_pretraining)
        except SystemExit as exit:
            status = exit.code
        assert settled == ([] if args is None else [args])
        assert not torch.distributed.is_initialized()
        assert list(tmp_path.iterdir()) == []
        return Run(args, status, *capsys.readouterr())

    return run


def assert_one_line(run: Run, *mentioned: str) -> None:
    """It ended with an exit status and one line on stderr, which says all of ``mentioned``."""
    assert run.args is None and run.status == 2
    lines = run.err.splitlines()
    assert len(lines) == 1, f"{len(lines)} lines, the last: {lines[-1:]}"
    assert lines[0].startswith("sla-megatron: error: --")
    assert [text for text in mentioned if text not in lines[0]] == [], lines[0]


@pytest.mark.parametrize(("command_line", "world_size", "mentioned"), BAD, ids=[row[0] for row in BAD])
def test_refused(settle: Callable[..., Run], command_line: str, world_size: int, mentioned: tuple[str, ...]) -> None:
    """Exit status 2 and one line with flag, value and what is accepted; no process group, nothing written."""
    assert_one_line(settle(command_line, world_size), *mentioned)


def test_only_rank_0_says_why(settle: Callable[..., Run]) -> None:
    """The other ranks end with the same status, in silence."""
    run = settle("--sla --sla-skip-distance 0 --tensor-model-parallel-size 2", world_size=2, rank=1)
    assert (run.args, run.status, run.err) == (None, 2, "")


@pytest.mark.parametrize("name", SETTLED)
def test_refused_with_sla_on_any_device(settle: Callable[..., Run], name: str) -> None:
    """The option's own flag and value are named; without ``--sla`` it is none of our business."""
    from sla_megatron.flags.validation import resolve_sla_args

    args = settle("--sla").args
    setattr(args, name, SETTLED[name])
    with pytest.raises(FlagError) as error:
        resolve_sla_args(args)
    assert str(error.value).startswith(f"sla-megatron: error: --{name.replace('_', '-')} {SETTLED[name]}: expected ")
    dense = settle("").args
    setattr(dense, name, SETTLED[name])
    resolve_sla_args(dense)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        # Heads of 8: 12 of queries, and keys and values of 12 in the first nine layers, of 3 in the last three.
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, None),
        (
            {"fp8": "hybrid", "fp8_recipe": "mxfp8"},
            "mxfp8 rows of linear_qkv in multiples of 32: layer 10",
        ),
        ({"fp4": "e2m1", "fp4_recipe": "nvfp4"}, "nvfp4 rows of linear_qkv in multiples of 32: layer 10"),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8", "sla_kv_projection": "full"}, None),
        # With 12 keys and 3 values: an odd number of heads.
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise", "sla_share": "values"}, "of 16: layer 10 has 216 on"),
        ({"fp8": "hybrid", "fp8_recipe": "delayed", "kv_channels": 6}, "multiples of 16: layer 1 has 216 on"),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8", "kv_channels": 32}, None),
        (
            {
                "fp8": "hybrid",
                "fp8_recipe": "mxfp8",
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 1,
                "num_layers_at_end_in_bf16": 3,
            },
            None,
        ),
    ],
)
def test_rows_that_fp8_needs(settle: Callable[..., Run], changes: dict[str, object], refused: str | None) -> None:
    """Left-out projections leave a multiple that the recipe can take, or the line says which layer does not."""
    from sla_megatron.flags.validation import resolve_sla_args

    flags = "--sla --sla-kv-projection pruned --kv-channels 8"
    recomputed = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    args = settle(f"{flags} {recomputed}").args
    vars(args).update(changes)
    if refused is None:
        resolve_sla_args(args)
        return
    with pytest.raises(FlagError, match=f"--sla-kv-projection pruned: expected full, or with .*{refused}"):
        resolve_sla_args(args)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, None),
        ({"cuda_graph_warmup_steps": 0}, "--cuda-graph-warmup-steps 0: expected 1 or more"),
        (
            {"pipeline_model_parallel_size": 2},
            "--cuda-graph-impl full_iteration: expected none with a pipeline",
        ),
        ({"pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "global_batch_size": 2}, None),
    ],
)
def test_a_step_as_a_graph(settle: Callable[..., Run], changes: dict[str, object], refused: str | None) -> None:
    """The whole step, on a GPU, where neither upstream nor a first step waits for the host."""
    from sla_megatron.flags.validation import resolve_sla_args

    args = settle("--sla").args
    vars(args).update({"cuda_graph_impl": "full_iteration", **changes})
    if refused is None:
        resolve_sla_args(args)
        return
    with pytest.raises(FlagError, match=refused):
        resolve_sla_args(args)


def test_two_types_in_a_pipeline_are_refused(settle: Callable[..., Run]) -> None:
    """On a GPU; without one it is refused before."""
    from sla_megatron.flags.validation import resolve_sla_args

    args = settle("--sla").args
    args.fp32_residual_connection = True
    resolve_sla_args(args)
    args.pipeline_model_parallel_size = 2
    with pytest.raises(FlagError, match="--fp32-residual-connection True: .* travel as one type"):
        resolve_sla_args(args)


def test_refusals_name_flags_that_megatron_has(megatron: None) -> None:
    """Every option that a refusal names is spelled as Megatron's parser spells it."""
    from megatron.training.arguments import add_megatron_arguments

    from sla_megatron.flags import entry_point, validation

    parser = ArgumentParser()
    add_megatron_arguments(parser)
    flags = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    named = [row[0] for row in (*validation._REFUSED, *entry_point._NOT_HERE)]
    assert len(named) > 15
    assert [name for name in named if flags.get(validation.flag_of(name)) != name] == []


def test_a_model_class_of_another_library_is_refused(settle: Callable[..., Run]) -> None:
    """With --sla; as ModelOpt asks for in upstream's script."""
    from sla_megatron import gpt_config_from_args

    with pytest.raises(ValueError, match="builds an SLA model, not one of ModelOptModelConfig"):
        gpt_config_from_args(settle("--sla").args, model_config_cls=type("ModelOptModelConfig", (), {}))


@pytest.mark.parametrize("command_line", GOOD)
def test_accepted(settle: Callable[..., Run], command_line: str) -> None:
    """It parses without a word on stderr, and what was left open has the documented default."""
    from sla_megatron import sla_config_from_args

    world_size, expected = GOOD[command_line]
    run = settle(command_line, world_size)
    assert (run.status, run.err) == (0, "")
    assert sla_config_from_args(run.args) == expected


def test_every_default_is_filled_in(settle: Callable[..., Run]) -> None:
    """The arguments, which are stored with every checkpoint, say what the run does."""
    args = settle("--sla").args
    assert (args.sla_skip_distance, args.sla_num_skip_groups, args.sla_kv_projection) == ([9], 9, "full")
    assert (args.sla_layers, args.sla_share, args.sla_source_layer) == (None, "kv", None)
    assert settle("--sla --sla-layers 12,10,11").args.sla_layers == "10-12"


def test_shares_are_spelled_out(settle: Callable[..., Run]) -> None:
    """What is stored with a checkpoint means the same in a model of another size: plain integers and ranges."""
    args = settle("--sla --sla-source-layer 0.5 1 --sla-num-skip-groups 0.5 --sla-layers 8-/2").args
    found = (args.sla_source_layer, args.sla_skip_distance, args.sla_num_skip_groups, args.sla_layers)
    assert found == ([6, 1], None, 6, "8,10,12")
    assert [type(number) for number in (*args.sla_source_layer, args.sla_num_skip_groups)] == [int] * 3


@pytest.mark.parametrize(
    "settings",
    [
        "--sla-skip-distance 6 9 --sla-layers 8,11-12 --sla-kv-projection pruned",
        "--sla-source-layer 0.5 1 --sla-num-skip-groups 1.0 --sla-share keys --sla-layers 2-/3",
    ],
)
def test_settled_arguments_stay_as_they_are(settle: Callable[..., Run], settings: str) -> None:
    """Resolving again, as after a checkpoint's settings were taken over, changes nothing."""
    from sla_megatron.flags.validation import resolve_sla_args

    args = settle(f"--sla {settings}").args
    before = dict(vars(args))
    resolve_sla_args(args)
    assert vars(args) == before


def test_without_sla_the_arguments_are_upstream_s(settle: Callable[..., Run]) -> None:
    """Nothing but our own, unset, flags is added, and no skip-layer model is asked for."""
    from megatron.training import arguments as upstream

    from sla_megatron import sla_config_from_args
    from sla_megatron.cpu.flags import fit_to_cpu

    ours = settle("").args
    theirs = upstream.parse_args()
    fit_to_cpu(theirs)
    upstream.validate_args(theirs)
    added = {key: value for key, value in vars(ours).items() if key not in vars(theirs)}
    assert {key: value for key, value in vars(ours).items() if key not in added} == vars(theirs)
    assert (added.pop("device"), added.pop("sla"), added.pop("core_attention")) == ("auto", False, "megatron")
    ours_alone = ("skip_distance", "source_layer", "num_skip_groups", "layers", "share", "kv_projection")
    assert added == dict.fromkeys(f"sla_{name}" for name in ours_alone)
    assert sla_config_from_args(ours) is None
    assert sla_config_from_args(theirs) is None


# --device, which is read before Megatron is imported.


@pytest.mark.parametrize("argv", ["--device gpu", "--device=cuda:0", "--device CPU", "--device", "--sla --device tpu"])
def test_a_bad_device_is_refused(argv: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the known devices, and the block is not entered."""
    monkeypatch.setenv("RANK", "0")
    entered = False
    with pytest.raises(SystemExit) as exit, megatron_device(argv.split()):
        entered = True
    assert not entered
    assert_one_line(Run(None, exit.value.code, *capsys.readouterr()), "--device", "one of auto, cpu, cuda")


@pytest.mark.parametrize(("argv", "active"), [("--device cpu --sla", True), ("--device cuda", False)])
def test_the_device_is_entered(
    megatron_imported: None, monkeypatch: pytest.MonkeyPatch, argv: str, active: bool
) -> None:
    """The CPU backend is on for ``cpu`` and off for ``cuda``; the wheel's build step is skipped on both."""
    from megatron.core.datasets import utils

    from sla_megatron.cpu.backend import cpu_backend_is_active

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    build_step = utils.compile_helpers
    with megatron_device(argv.split()) as device:
        assert device == ("cpu" if active else "cuda")
        assert cpu_backend_is_active() == active
        assert utils.compile_helpers is not build_step
    assert not cpu_backend_is_active()
    assert utils.compile_helpers is build_step


def test_other_errors_come_through() -> None:
    """Only a refused flag becomes a line; a mistake of ours or upstream's keeps its traceback."""
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


# The command itself.


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--device cpu --sla --sla-skip-distance 0",
            "sla-megatron: error: --sla-skip-distance 0: expected one or more integers >= 1",
        ),
        ("--sla --device tpu", "sla-megatron: error: --device tpu: expected one of auto, cpu, cuda"),
    ],
    ids=["skip-distance", "device"],
)
def test_the_command(tmp_path: Path, flags: str, line: str) -> None:
    """Started without torchrun: status 2, the line last on stderr and no traceback, and an empty folder."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {key: value for key, value in os.environ.items() if key not in ours and "SLURM" not in key}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[3])
    run = subprocess.run(
        [sys.executable, "-m", "sla_megatron.pretrain_gpt", *MODEL.split(), *flags.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    lines = run.stderr.splitlines()
    # Importing Megatron warns of packages that are not installed.
    assert [text for text in lines if text.startswith("sla-megatron: error:")] == [line] == lines[-1:]
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_sla_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """``--help`` ends well and shows our flags beside Megatron's."""
    from sla_megatron.flags import arguments

    monkeypatch.setattr("sys.argv", ["pretrain", "--help"])
    with pytest.raises(SystemExit) as ended:
        arguments.parse_and_validate_args()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--sla-skip-distance" in printed and "--num-layers" in printed
