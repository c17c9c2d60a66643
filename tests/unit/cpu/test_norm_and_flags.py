"""What the CPU backend supplies beside ``torch.cuda``: a norm for sequence parallelism, flags that fit."""

from __future__ import annotations

import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from sla_megatron.common.errors import FlagError
from sla_megatron.cpu.backend import cpu_backend
from sla_megatron.cpu.flags import fit_to_cpu

#: Megatron's parser passes an option that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

# The norm.


def config(**changes: object) -> SimpleNamespace:
    """The fields of a TransformerConfig that a norm looks at."""
    variants = dict.fromkeys(
        (
            "layernorm_zero_centered_gamma",
            "persist_layer_norm",
            "memory_efficient_layer_norm",
            "sequence_parallel",
        ),
        False,
    )
    return SimpleNamespace(**{"normalization": "LayerNorm", **variants, **changes})


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize(("kind", "parameters"), [("LayerNorm", 2), ("RMSNorm", 1)])
@pytest.mark.usefixtures("megatron")
def test_the_norm_marks_its_parameters(kind: str, parameters: int, sequence_parallel: bool) -> None:
    """With sequence parallelism every parameter is marked for Megatron to sum its gradient, else none is."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    norm = WrappedTorchNorm(config=config(normalization=kind, sequence_parallel=sequence_parallel), hidden_size=8)
    marks = [parameter.sequence_parallel for parameter in norm.parameters()]
    assert marks == [sequence_parallel] * parameters


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_the_norm_is_upstream_s(megatron_imported: None, kind: str) -> None:
    """The same class, size, epsilon and values as upstream's own, which refuses sequence parallelism."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def build(**changes: object) -> torch.nn.Module:
        return WrappedTorchNorm(config=config(normalization=kind, **changes), hidden_size=8, eps=1e-3)

    upstream = build()
    with pytest.raises(AssertionError, match="sequence parallel"):
        build(sequence_parallel=True)
    with cpu_backend():
        ours = build(sequence_parallel=True)
    x = torch.randn(4, 8)
    assert (type(ours), ours.eps, ours.normalized_shape) == (type(upstream), 1e-3, (8,))
    assert torch.equal(ours(x), upstream(x))
    assert ours.state_dict().keys() == upstream.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"normalization": "L2Norm"}, "--normalization L2Norm.*LayerNorm, RMSNorm"),
        ({"persist_layer_norm": True}, "persist_layer_norm"),
        ({"memory_efficient_layer_norm": True}, "memory_efficient_layer_norm"),
    ],
    ids=["L2Norm", "persistent", "memory-efficient"],
)
@pytest.mark.usefixtures("megatron")
def test_norms_that_torch_lacks_are_refused(changes: dict[str, object], named: str) -> None:
    """By name, not ignored."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    with pytest.raises(ValueError, match=named):
        WrappedTorchNorm(config=config(**changes), hidden_size=8)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.usefixtures("megatron")
def test_a_zero_centered_norm_starts_as_the_plain_one(kind: str) -> None:
    """Its weight starts at zero and counts from one; the gradient is the plain norm's."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    plain = WrappedTorchNorm(config=config(normalization=kind), hidden_size=8)
    centered = WrappedTorchNorm(config=config(normalization=kind, layernorm_zero_centered_gamma=True), hidden_size=8)
    assert not centered.weight.any()
    x, moved = torch.randn(4, 8), torch.randn(8)
    with torch.no_grad():
        plain.weight += moved
        centered.weight += moved
    assert torch.equal(centered(x), plain(x))
    plain(x).square().sum().backward()
    centered(x).square().sum().backward()
    assert torch.equal(centered.weight.grad, plain.weight.grad)


# The flags.

#: What a plain command line turns into, in the order of the printed line.
FITTED = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "num_workers": 0,
}

#: The flags that ask for all of it.
ASKED_FOR = (
    "--distributed-backend gloo --transformer-impl local --use-cpu-initialization --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --num-workers 0"
)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, megatron: None):
    """A function from a command line to Megatron's parsed, not yet validated, arguments."""
    from megatron.training.arguments import parse_args

    def parse(command_line: str = "") -> Namespace:
        monkeypatch.setattr(sys, "argv", ["prog", *command_line.split()])
        return parse_args()

    monkeypatch.delenv("RANK", raising=False)
    return parse


def test_megatron_s_defaults_are_fitted_with_one_line(parsed, capsys: pytest.CaptureFixture) -> None:
    """What needs CUDA is switched off, each change is in the one printed line, and nothing else changes."""
    args = parsed()
    before = dict(vars(args))
    fit_to_cpu(args)
    assert vars(args) == {**before, **FITTED}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("sla-megatron: no GPU: distributed_backend=gloo, transformer_impl=local, ")
    assert line.count("=") == len(FITTED)
    assert "no_persist_layer_norm=True" in line


def test_flags_that_fit_print_nothing(parsed, capsys: pytest.CaptureFixture) -> None:
    """Nothing was changed, so nothing is said; nor a second time."""
    fit_to_cpu(parsed(ASKED_FOR))
    args = parsed()
    fit_to_cpu(args)
    capsys.readouterr()
    fit_to_cpu(args)
    assert capsys.readouterr().out == ""


def test_only_what_changed_is_said(parsed, capsys: pytest.CaptureFixture) -> None:
    """One flag short of fitting, one item in the line."""
    fit_to_cpu(parsed(ASKED_FOR.replace("--num-workers 0", "--num-workers 4")))
    assert capsys.readouterr().out == "sla-megatron: no GPU: num_workers=0\n"


def test_only_rank_0_speaks(parsed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The other ranks change the same, in silence."""
    monkeypatch.setenv("RANK", "1")
    args = parsed()
    fit_to_cpu(args)
    assert args.distributed_backend == "gloo"
    assert capsys.readouterr().out == ""


#: Command line -> how the refusal begins.
REFUSED = {
    "--fp8-format e4m3": "--fp8-format e4m3: expected no fp8",
    "--fp8-format hybrid": "--fp8-format hybrid: expected no fp8",
    "--fp4-format e2m1": "--fp4-format e2m1: expected no fp4",
    "--cuda-graph-impl local": "--cuda-graph-impl local: expected none",
    "--cuda-graph-impl transformer_engine": "--cuda-graph-impl transformer_engine: expected none",
    "--enable-cuda-graph": "--enable-cuda-graph True: expected no",
    "--external-cuda-graph": "--external-cuda-graph True: expected no",
    "--tp-comm-overlap": "--tp-comm-overlap True: expected no --tp-comm-overlap",
    "--moe-grouped-gemm": "--moe-grouped-gemm True: expected no --moe-grouped-gemm",
    "--cross-entropy-loss-fusion": "--cross-entropy-loss-fusion True: expected no --cross-entropy",
    "--use-megatron-fsdp": "--use-megatron-fsdp True: expected no FSDP",
    "--recompute-modules moe_act layernorm": "--recompute-modules moe_act layernorm: expected no layernorm",
}


@pytest.mark.parametrize("command_line", REFUSED)
def test_what_cannot_run_is_refused(parsed, command_line: str) -> None:
    """By the flag as it was typed and its value; the arguments stay as they were."""
    args = parsed(command_line)
    before = dict(vars(args))
    with pytest.raises(FlagError) as error:
        fit_to_cpu(args)
    assert str(error.value).startswith(f"sla-megatron: error: {REFUSED[command_line]}")
    assert vars(args) == before
