"""What arguments say of the model: its kind, the rope scaling factor, and that each stage must be handed a mask."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.unit.flags.flag_tables import MODEL

pytestmark = [pytest.mark.usefixtures("megatron"), pytest.mark.filterwarnings("ignore")]

ROPE = "--position-embedding-type rope"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Namespace]:
    from sla_megatron.flags.arguments import settled_args

    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda flags: settled_args(argv=[*MODEL.split(), *flags.split()], silent=True)


@pytest.mark.parametrize("sla", ["", "--sla"])
def test_the_rope_scaling_factor_is_forwarded_and_marked(settled: Callable[[str], Namespace], sla: str) -> None:
    """The mark is where the factor is; upstream, with the same arguments, has 8."""
    from megatron.training.argument_utils import gpt_config_from_args as upstreams

    from sla_megatron import gpt_config_from_args

    args = settled(f"{sla} {ROPE} --use-rope-scaling --rope-scaling-factor 32")
    assert (upstreams(args).rope_scaling_factor, hasattr(args, "rope_scaling_factor_honoured")) == (8.0, False)
    config = gpt_config_from_args(args)
    assert (config.rope_scaling, config.rope_scaling_factor, args.rope_scaling_factor_honoured) == (True, 32.0, True)
    unscaled = settled(f"{sla} {ROPE}")
    assert gpt_config_from_args(unscaled).rope_scaling is False
    assert not hasattr(unscaled, "rope_scaling_factor_honoured")


PATTERN = "--hybrid-layer-pattern *-*-"


@pytest.mark.parametrize(
    ("flags", "has_gpu", "kind"),
    [
        ("", True, "GPTModelConfig"),
        ("--sla", True, "SLAGPTModelConfig"),
        # Upstream's own result where nothing was asked of us; it has no hybrid model for the CPU.
        (PATTERN, True, "HybridModelConfig"),
        (PATTERN, False, "SLAHybridModelConfig"),
        (f"{PATTERN} --core-attention sdpa", True, "SLAHybridModelConfig"),
        (f"{PATTERN} --sla", True, "SLAHybridModelConfig"),
        (f"{PATTERN} --sla --reset-attention-mask", False, "SLAHybridModelConfig"),
    ],
)
def test_the_kind_of_model(settled: Callable[[str], Namespace], flags: str, has_gpu: bool, kind: str) -> None:
    """With ``--hybrid-layer-pattern`` a hybrid one, whose ``sla`` counts attention layers; else a GPT."""
    from sla_megatron import model_config_from_args
    from sla_megatron.cpu.backend import another_machine

    args = settled(flags)
    with another_machine() if has_gpu else nullcontext():
        config = model_config_from_args(args)
    assert type(config).__name__ == kind
    sla = getattr(config, "sla", None)
    assert (sla is not None) == ("--sla" in flags)
    assert sla is None or sla.num_layers == (2 if PATTERN in flags else config.transformer.num_layers)
    assert getattr(config, "needs_masks", False) == ("mask" in flags)


def test_layers_that_need_transformer_engine_are_refused(settled: Callable[[str], Namespace]) -> None:
    """Where the model has none; layers of a spec of one's own are one's own business."""
    from sla_megatron import FlagError, hybrid_config_from_args

    args = settled(f"--sla {PATTERN}")
    args.hybrid_layer_pattern = "*-G*"
    expected = r"--hybrid-layer-pattern \*-G\*: expected layers of \* - E M with --transformer-impl local"
    with pytest.raises(FlagError, match=expected):
        hybrid_config_from_args(args)
    args.spec = ["tests.support.hybrid_layers", "STACK"]
    assert hybrid_config_from_args(args).hybrid_stack_spec.params


@pytest.mark.parametrize("flags", ["--sla", "--core-attention sdpa"])
def test_a_class_of_somebody_elses_is_refused(settled: Callable[[str], Namespace], flags: str) -> None:
    from megatron.training.models.hybrid import HybridModelConfig

    from sla_megatron import hybrid_config_from_args

    with pytest.raises(ValueError, match=f"{flags.split()[0]} builds .*, not one of HybridModelConfig"):
        hybrid_config_from_args(settled(f"{PATTERN} {flags}"), model_config_cls=HybridModelConfig)


@pytest.mark.parametrize("core_attention", ["megatron", "sdpa"])
def test_layers_that_predict_further_tokens_have_no_skip_heads(
    settled: Callable[[str], Namespace], core_attention: str
) -> None:
    """Their attention is upstream's class, with the core attention that was asked for; the decoder's is ours."""
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from sla_megatron.attention.core_attention import TorchAttention
    from sla_megatron.attention.self_attention import SLASelfAttention
    from sla_megatron.commands.convert.megatron_model import build, megatron_alone

    args = settled(f"--sla {ROPE} --mtp-num-layers 2 --core-attention {core_attention}")
    args.padded_vocab_size = 128
    with megatron_alone():
        model = build(args)
    further = [layer.mtp_model_layer.self_attention for layer in model.mtp.layers]
    decoders = [layer.self_attention for layer in model.decoder.layers]
    assert [type(attention) for attention in further] == [SelfAttention] * 2
    assert {type(attention) for attention in decoders} == {SLASelfAttention}
    expected = TorchAttention if core_attention == "sdpa" else DotProductAttention
    assert {type(attention.core_attention) for attention in (*further, *decoders)} == {expected}


def test_a_stage_without_a_mask_ends_the_run(
    settled: Callable[[str], Namespace], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As upstream's get_batch leaves it between the ends; by position or by name, on whichever rank."""
    from sla_megatron import gpt_config_from_args
    from sla_megatron.model.builder import _require_mask

    class Stage(torch.nn.Module):
        def forward(self, tokens: None, positions: None, attention_mask: Tensor | None, labels: None = None) -> str:
            return "ran"

    assert gpt_config_from_args(settled("--sla --reset-attention-mask")).needs_masks
    assert not gpt_config_from_args(settled("--sla")).needs_masks
    monkeypatch.setenv("RANK", "3")
    stage = Stage()
    stage.register_forward_pre_hook(_require_mask, with_kwargs=True)
    assert stage(None, None, torch.ones(1)) == stage(None, None, attention_mask=torch.ones(1)) == "ran"
    for left_out in ({"attention_mask": None}, {"attention_mask": None, "labels": None}):
        with pytest.raises(SystemExit) as ended:
            stage(None, None, **left_out)
        said = capsys.readouterr().err
        assert (ended.value.code, said.count("\n")) == (2, 1)
        assert said.startswith(
            "sla-megatron: error: --reset-attention-mask True: expected batches with a mask on every"
        )
    with torch.no_grad():
        assert stage(None, None, None) == "ran"
    assert stage.eval()(None, None, None) == "ran"


def test_settings_are_compared_where_a_local_checkpoint_is_loaded(
    settled: Callable[[str], Namespace], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's own check of a checkpoint's arguments, which it calls once a checkpoint is chosen, hears of SLA's."""
    from megatron.training import checkpointing, global_vars

    from sla_megatron.flags.checkpoint_settings import check_settings_on_loading

    # Put back afterwards: the wrapping is for the rest of a process.
    monkeypatch.setattr(checkpointing, "check_checkpoint_args", checkpointing.check_checkpoint_args)
    args = settled("--sla --sla-skip-distance 2")
    monkeypatch.setattr(checkpointing, "_CHECKPOINT_VERSION", 3.0)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    other, same = settled("--sla --sla-skip-distance 3"), settled("--sla --sla-skip-distance 2")
    check_settings_on_loading(Namespace(non_persistent_ckpt_type="global"))
    checkpointing.check_checkpoint_args(other)
    check_settings_on_loading(Namespace(non_persistent_ckpt_type="local"))
    checkpointing.check_checkpoint_args(same)
    with pytest.raises(SystemExit) as ended:
        checkpointing.check_checkpoint_args(other)
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert said.startswith("sla-megatron: error: --sla-skip-distance 2: expected 3 as in the checkpoint that is loaded")
