"""Kernels of Apex and Transformer Engine that are not installed: here, as on a GPU without them, upstream has none.

What a default does without its kernel is asked of upstream's own layers.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from examples.quickstart import flags as quickstart
from sla_megatron.cpu.backend import cpu_backend

from .flag_tables import MODEL

pytestmark = pytest.mark.filterwarnings("ignore")

FLAGS = (
    f"{MODEL} --transformer-impl local --position-embedding-type rope --bf16 --use-cpu-initialization --eval-interval 1"
)
OFF = {
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}


@pytest.fixture
def settled(megatron_imported: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[..., Namespace]:
    """A function from flags to arguments as they are on a GPU: the CPU backend's own flags are not set."""
    from sla_megatron.flags import arguments
    from sla_megatron.flags.fused_kernels import switch_off_missing_kernels

    monkeypatch.setattr(arguments, "cpu_backend_is_active", lambda: False)
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def settle(flags: str = "", check: Any = switch_off_missing_kernels) -> Namespace:
        with cpu_backend():
            return arguments.settled_args(check=check, argv=[*FLAGS.split(), *flags.split()])

    return settle


@pytest.fixture(scope="module")
def group(megatron_imported: None) -> Iterator[None]:
    """One rank."""
    from megatron.core import parallel_state, tensor_parallel

    # It is left again: upstream's own norms are wanted, too.
    with cpu_backend():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    with cpu_backend():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _output_layer(config: Any) -> None:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    with cpu_backend():
        ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.zeros_)


def _norm(config: Any) -> None:
    from megatron.core.models.backends import LocalSpecProvider

    LocalSpecProvider().layer_norm()(config=config, hidden_size=8)


def _attention(config: Any) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    with cpu_backend():
        attention = DotProductAttention(config, 1, AttnMaskType.causal, "self")
        attention(*torch.ones(3, 32, 1, 12, 4, dtype=torch.bfloat16), None, AttnMaskType.causal)


def _rotary(config: Any) -> None:
    config.__post_init__()


#: Argument -> the field of the config that it is, what needs the kernel, and how upstream fails without.
UPSTREAM: dict[str, tuple[str, Callable[[Any], None], type[Exception], str]] = {
    "gradient_accumulation_fusion": (
        "gradient_accumulation_fusion",
        _output_layer,
        RuntimeError,
        "fused_weight_gradient_mlp_cuda",
    ),
    "no_persist_layer_norm": ("persist_layer_norm", _norm, AssertionError, "persist_layer_norm not supported"),
    "masked_softmax_fusion": ("masked_softmax_fusion", _attention, ModuleNotFoundError, "scaled_masked_softmax_cuda"),
    "apply_rope_fusion": ("apply_rope_fusion", _rotary, ValueError, "apply_rope_fusion is not available"),
}


@pytest.mark.parametrize("argument", OFF)
def test_upstream_fails_with_the_default_and_not_without(
    settled: Callable[..., Namespace], group: None, argument: str
) -> None:
    from megatron.training.argument_utils import core_transformer_config_from_args

    field, use, error, said = UPSTREAM[argument]
    config = core_transformer_config_from_args(settled())
    use(config)
    setattr(config, field, True)
    with pytest.raises(error, match=said):
        use(config)


@pytest.mark.parametrize("sla", ["", "--sla"])
def test_one_line_says_what_is_off(
    settled: Callable[..., Namespace], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, sla: str
) -> None:
    """The same for a dense run, whose arguments differ from upstream's in nothing else; other ranks are silent."""
    plain = settled(f"{sla} --no-rope-fusion", check=None)
    capsys.readouterr()
    found = settled(sla)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sla-megatron: ")]
    listed = ", ".join(f"{name}={value}" for name, value in OFF.items())
    assert lines == [f"sla-megatron: fused kernels of Apex or Transformer Engine are missing: {listed}"]
    assert {name: value for name, value in vars(found).items() if vars(plain)[name] != value} == {
        name: value for name, value in OFF.items() if name != "apply_rope_fusion"
    }
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settled(sla).gradient_accumulation_fusion is False
    assert "sla-megatron: fused kernels" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "off"),
    [
        ("--core-attention sdpa", {"gradient_accumulation_fusion", "no_persist_layer_norm", "apply_rope_fusion"}),
        ("--position-embedding-type learned_absolute", set(OFF) - {"apply_rope_fusion"}),
        (" ".join(f"--no-{name}" for name in ("gradient-accumulation-fusion", "persist-layer-norm")), set(OFF)),
    ],
)
def test_only_what_is_used_is_switched_off(
    settled: Callable[..., Namespace], capsys: pytest.CaptureFixture, flags: str, off: set[str]
) -> None:
    found = settled(flags)
    said = next(line for line in capsys.readouterr().out.splitlines() if "fused kernels" in line)
    given = {name for name in OFF if f"--{name.replace('_', '-')}" in flags or f"--no-{name}" in flags}
    given |= {"gradient_accumulation_fusion"} if "--no-gradient" in flags else set()
    assert {name for name, value in OFF.items() if getattr(found, name) == value} >= off
    assert {name for name in OFF if f"{name}=" in said} == off - given


def test_the_quickstart_needs_no_kernel(settled: Callable[..., Namespace]) -> None:
    """On a GPU its flags are the same as without one, and what they ask for by default is off there too."""
    found = settled(f"{quickstart.MODEL} {quickstart.TRAINING} --sla")
    assert {name: getattr(found, name) for name in OFF} == OFF
    assert (found.transformer_impl, found.num_layers) == ("local", 8)


def test_what_upstream_found_stays_on(
    settled: Callable[..., Namespace], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all of Apex and Transformer Engine nothing is touched; Apex has no persistent RMSNorm."""
    import importlib.util

    from megatron.core.models import backends
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(backends, "HAVE_APEX", True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", lambda: None)
    monkeypatch.setitem(sys.modules, "scaled_masked_softmax_cuda", importlib.util)
    found = settled("")
    assert [name for name, value in OFF.items() if getattr(found, name) == value] == []
    assert "fused kernels" not in capsys.readouterr().out
    found = settled("--normalization RMSNorm")
    assert [name for name, value in OFF.items() if getattr(found, name) == value] == ["no_persist_layer_norm"]


def test_the_entry_point_and_the_benchmarks_do_so(
    settled: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both settle on a GPU what upstream can build; a script of one's own, whose flags are upstream's, does not."""
    from benchmarks.training_steps import settle
    from sla_megatron import pretrain_gpt
    from sla_megatron.flags import arguments

    class Stop(Exception):
        pass

    def stop(args: Namespace) -> None:
        raise Stop({name: getattr(args, name) for name in OFF})

    monkeypatch.setattr(arguments, "set_global_variables", stop)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *FLAGS.split()])
    with cpu_backend(), pytest.raises(Stop) as stopped:
        pretrain_gpt._arguments()
    assert stopped.value.args == (OFF,)
    with cpu_backend():
        args = settle(FLAGS.split())
        assert {name: getattr(args, name) for name in OFF} == OFF
    with cpu_backend(), pytest.raises(SystemExit):
        arguments.parse_and_validate_args()
