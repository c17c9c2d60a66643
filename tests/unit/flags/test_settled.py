"""One function settles flags, for training and for every command: each complaint is the same line everywhere.

What Megatron refuses is quoted from Megatron (``megatron/training/arguments.py``), not from what this project prints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .flag_tables import MODEL

#: Flags beyond a model's -> what everybody says of them.
COMPLAINTS = {
    "--num-layer 4": "--num-layer 4: expected a known flag, such as --num-layers",
    "--lr fast": "--lr fast: expected a number",
    "--hidden-size": "--hidden-size without a value: expected one value",
    "--normalization BatchNorm": "--normalization BatchNorm: expected one of LayerNorm, RMSNorm",
    # An assertion of Megatron's that says nothing else.
    "--num-attention-heads 7": "% args.num_attention_heads == 0 (--hidden-size 48, --num-attention-heads 7)",
    "--sla --sla-skip-distance 0": "--sla-skip-distance 0: expected one or more integers >= 1",
    "--sla --multi-latent-attention": "--multi-latent-attention True: expected no multi-latent attention with --sla",
}

pytestmark = [pytest.mark.usefixtures("megatron"), pytest.mark.filterwarnings("ignore")]

Said = Callable[[list[str]], str]


@pytest.fixture(params=["training", "plan", "doctor", "sweep", "convert"])
def said(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> Said:
    """What one of the five says of a command line that it refuses, without any program's name."""
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def training(argv: list[str]) -> str:
        from sla_megatron.flags import arguments

        written: list[object] = []
        monkeypatch.setattr(arguments, "set_global_variables", written.append)
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *argv])
        with pytest.raises(SystemExit) as ended:
            arguments.parse_and_validate_args()
        assert (ended.value.code, written, list(tmp_path.iterdir())) == (2, [], [])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sla-megatron: error: ")]
        return line.removeprefix("sla-megatron: error: ")

    def plan(argv: list[str]) -> str:
        from sla_megatron.commands.plan import cli

        monkeypatch.setattr(sys, "argv", ["sla-plan", "--sla", *argv])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        # Where Megatron is asked for long, there are lines that say so before.
        *waiting, line = err.splitlines()
        assert out == "" and all(said.startswith("sla-plan: asking Megatron") for said in waiting)
        return line.removeprefix("sla-plan: error: ")

    def doctor(argv: list[str]) -> str:
        from sla_megatron.commands.doctor.finding import Fault
        from sla_megatron.commands.doctor.job import job_args
        from sla_megatron.commands.doctor.place import Place

        monkeypatch.setattr(sys, "argv", ["sla-doctor", *argv])
        with pytest.raises(Fault) as fault:
            job_args(Place(0, 1, 0, "here", launched=False), None, on_cpu=False)
        return str(fault.value)

    def sweep(argv: list[str]) -> str:
        from sla_megatron.commands.sweep.errors import SweepError
        from sla_megatron.commands.sweep.flag_words import Shape
        from sla_megatron.commands.sweep.grid import Run, Setting
        from sla_megatron.commands.sweep.settle import check_runs

        run = Run("size", Setting(), 1, tuple(argv), 10, Shape(12, 12, 12, 64, 2, 1, None))
        with pytest.raises(SweepError) as error:
            check_runs([run])
        return str(error.value).removeprefix(f"{run.name}: ")

    def convert(argv: list[str]) -> str:
        from sla_megatron.commands.convert.errors import ConvertError
        from sla_megatron.commands.convert.megatron_model import args_of

        with pytest.raises(ConvertError) as error:
            args_of(argv, torch.float32)
        return str(error.value).removeprefix("Megatron does not accept the model: ")

    return {"training": training, "plan": plan, "doctor": doctor, "sweep": sweep, "convert": convert}[request.param]


@pytest.mark.parametrize("flags", COMPLAINTS)
def test_one_line_whoever_asks(said: Said, flags: str) -> None:
    """The flag, its value and what is accepted; no usage, no traceback."""
    line = said([*MODEL.split(), *flags.split()])
    text = COMPLAINTS[flags]
    assert text in line and "\n" not in line
    # Ours are the whole line; Megatron's are introduced as such, but where a model is built from a checkpoint.
    assert line.startswith((text, "Megatron does not accept these flags: assert ", "assert "))


def test_what_is_no_refusal_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that Megatron does not mean for users is given with its place; its cause stays behind it."""
    from sla_megatron.common.errors import StartError
    from sla_megatron.flags.arguments import MegatronRefusal, megatron_refusals

    with pytest.raises(MegatronRefusal, match=r"KeyError: 'layers' \(.*test_settled.py:\d+\)") as refused:
        with megatron_refusals():
            {}["layers"]
    assert isinstance(refused.value.__cause__, KeyError)
    with pytest.raises(StartError, match="^ours$"), megatron_refusals():
        raise StartError("ours")


@pytest.mark.parametrize("said", ["training", "plan"], indirect=True)
def test_the_model_s_own_complaints_come_before_anything_is_written(said: Said) -> None:
    """What only Megatron's ``TransformerConfig`` refuses ends a training run as early as a flag does.

    Where flags alone are settled no model is configured.
    """
    line = said([*MODEL.split(), "--recompute-granularity", "full"])
    assert "Using recompute_granularity: full so recompute_method must be" in line
