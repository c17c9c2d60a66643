"""Flags that would do nothing, or end a run late: one line each, of training and of the doctor, with --sla and without.

What each row does in Megatron was seen in real runs; the tests below look at the rows that can be seen without one.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest

from .flag_tables import MODEL

pytestmark = [pytest.mark.usefixtures("megatron"), pytest.mark.filterwarnings("ignore")]

ROPE = "--position-embedding-type rope"
NEEDS_ROPE = f"expected {ROPE} beside it"
NEEDS_TE = "expected --transformer-impl transformer_engine beside it: local layers do not heed it"
NOTHING = "expected no such flag: nothing in Megatron heeds it"
NO_GPU = "without a GPU"
MASK = "--reset-attention-mask"
PACKED = "--dataloader-inter-document-masking"
SDPA_PACKED = f"{PACKED} --core-attention sdpa"
HYBRID = "--hybrid-layer-pattern *-*-"
HYBRID_EXPERTS = "--hybrid-layer-pattern *E*E --num-experts 4 --disable-bias-linear"
UNHEEDED = "expected no such flag with --hybrid-layer-pattern: Megatron's HybridModel does not heed it"
FSDP2 = "--use-torch-fsdp2 --untie-embeddings-and-output-weights"

#: Flags -> the line, as it begins; on the CPU, in a model that is whole without them.
REFUSED: dict[str, str] = {
    # They have no effect.
    "--freeze-all-layers": "--freeze-all-layers True: expected no --freeze-all-layers: Megatron trains all layers",
    "--create-all-gather-group": "--create-all-gather-group True: expected no such flag: a model built in this way",
    "--rampup-batch-size 2 2 8": "--rampup-batch-size 2 2 8: expected --step-batch-size-schedule in its place",
    "--exit-signal-handler-for-dataloader": "--exit-signal-handler-for-dataloader True: expected --exit-sig",
    "--apply-residual-connection-post-layernorm": f"--apply-residual-connection-post-layernorm True: {NOTHING}",
    "--openai-gelu": f"--openai-gelu True: {NOTHING}",
    "--spec no.such.module layer": "--spec no.such.module layer: expected a module that can be imported and a name",
    "--spec megatron.core.transformer.spec_utils no_such": "--spec megatron.core.transformer.spec_utils no_such:",
    "--spec local": "--spec local: expected a module that can be imported and a name in it",
    "--spec a b c": "--spec a b c: expected a module that can be imported and a name in it",
    "--qk-l2-norm": f"--qk-l2-norm True: {NEEDS_TE}",
    "--attention-backend flash": "--attention-backend flash: expected auto with --transformer-impl local, or",
    "--use-flash-attn": "--use-flash-attn True: expected no --use-flash-attn with --transformer-impl local, or",
    "--tp-comm-overlap-cfg x.yaml": "--tp-comm-overlap-cfg x.yaml: expected --tp-comm-overlap beside it",
    "--test-mode": "--test-mode True: expected --qk-layernorm and LayerNorm beside it",
    "--test-mode --qk-layernorm --normalization RMSNorm": "--test-mode True: expected --qk-layernorm and LayerNorm",
    "--use-transformer-engine-op-fuser": f"--use-transformer-engine-op-fuser True: {NEEDS_TE}",
    "--use-te-activation-func": f"--use-te-activation-func True: {NEEDS_TE}",
    "--te-precision-config-file x.yaml": f"--te-precision-config-file x.yaml: {NEEDS_TE}",
    "--use-grouped-gemm-for-dense-mlp": f"--use-grouped-gemm-for-dense-mlp True: {NEEDS_TE}",
    "--mask-prob 0.3": "--mask-prob 0.3: expected no such flag: it is not for GPTs",
    "--vision-pretraining": "--vision-pretraining True: expected no such flag: it is not for GPTs",
    f"{SDPA_PACKED} {MASK}": f"{MASK} True: expected no such flag beside --dataloader-inter-document-masking or --sft",
    f"{PACKED} --micro-batch-size 2 --pipeline-model-parallel-size 2": f"{PACKED} True: expected --micro-batch-size 1",
    f"{PACKED} --context-parallel-size 2": f"{PACKED} True: expected --core-attention sdpa beside it with context",
    f"{SDPA_PACKED} --mtp-num-layers 1": "--mtp-num-layers 1: expected no --mtp-num-layers with documents",
    "--sft": "--sft True: expected --tokenizer-type SFTTokenizer beside it",
    "--sft --tokenizer-type SFTTokenizer --mock-data": "--sft True: expected --data-path FILE.jsonl beside it",
    "--rotary-base 500000": f"--rotary-base 500000: {NEEDS_ROPE}",
    "--rotary-percent 0.5": f"--rotary-percent 0.5: {NEEDS_ROPE}",
    "--rotary-interleaved": f"--rotary-interleaved True: {NEEDS_ROPE}",
    "--rotary-seq-len-interpolation-factor 2": f"--rotary-seq-len-interpolation-factor 2: {NEEDS_ROPE}",
    "--use-rope-scaling": f"--use-rope-scaling True: {NEEDS_ROPE}",
    "--use-rope-scaling --position-embedding-type yarn": f"--use-rope-scaling True: {NEEDS_ROPE}",
    f"{ROPE} --rope-scaling-factor 32": "--rope-scaling-factor 32.0: expected --use-rope-scaling beside it",
    f"{ROPE} --rotary-scaling-factor 32": "--rotary-scaling-factor 32.0: expected --position-embedding-type yarn",
    f"{ROPE} --mscale 0.5": "--mscale 0.5: expected --position-embedding-type yarn beside it",
    f"{ROPE} --yarn-beta-fast 16": "--yarn-beta-fast 16.0: expected --position-embedding-type yarn beside it",
    "--window-attn-skip-freq 2": "--window-attn-skip-freq 2: expected --window-size beside it",
    "--moe-layer-freq 2": "--moe-layer-freq 2: expected --num-experts beside it",
    f"{ROPE} --reset-position-ids": "--reset-position-ids True: expected --reset-attention-mask beside it: only",
    f"{MASK} --window-size 4,0": f"{MASK} True: expected no --window-size beside it: it makes a mask of its own",
    f"{MASK} --no-create-attention-mask-in-dataloader": f"{MASK} True: expected no --no-create-attention-mask",
    # Of hybrid models.
    f"{HYBRID} {ROPE} --use-rope-scaling": f"--use-rope-scaling True: {UNHEEDED}",
    f"{HYBRID} {ROPE} --rotary-interleaved": f"--rotary-interleaved True: {UNHEEDED}",
    f"{HYBRID} --position-embedding-type relative": "--position-embedding-type relative: expected learned_absolute, "
    "rope or yarn: Megatron's HybridModel does not heed it",
    f"{HYBRID} --mtp-num-layers 1": "--mtp-num-layers 1: expected no --mtp-num-layers with --hybrid-layer-pattern",
    f"{HYBRID} --mtp-hybrid-override-pattern M": "--mtp-hybrid-override-pattern M: expected no such flag",
    f"{HYBRID}/*-": "--hybrid-layer-pattern *-*-/*-: expected no /: layers that predict further tokens",
    "--hybrid-layer-pattern *-|*-": "--hybrid-layer-pattern *-|*-: expected no | without a pipeline",
    "--hybrid-override-pattern *-*-*- --pipeline-model-parallel-size 4": "--hybrid-override-pattern *-*-*-: expected "
    "a | at each stage's end, or layers that divide",
    f"{HYBRID} --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 "
    "--decoder-last-pipeline-num-layers 2": "--hybrid-layer-pattern *-*-: expected a | at each stage's end, or layers",
    "--hybrid-layer-pattern *E*-": "--hybrid-layer-pattern *E*-: expected --num-experts beside it, for E",
    f"{HYBRID} --num-experts 4 --disable-bias-linear": "--num-experts 4: expected an E in --hybrid-layer-pattern",
    f"{HYBRID_EXPERTS} --moe-layer-freq 2": "--moe-layer-freq 2: expected an E in --hybrid-layer-pattern for each",
    f"{HYBRID_EXPERTS} --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --bf16 "
    "--overlap-moe-expert-parallel-comm": "--overlap-moe-expert-parallel-comm True: expected no such flag with --hyb",
    "--hybrid-layer-pattern M*M*": f"--hybrid-layer-pattern M*M*: expected no M or G {NO_GPU}",
    # They end a run when it has started, or do not end it.
    "--moe-use-upcycling --num-experts 4 --disable-bias-linear": "--moe-use-upcycling True: expected no",
    f"{ROPE} --mtp-num-layers 1 --pipeline-model-parallel-size 2": "--mtp-num-layers 1: expected --untie-embeddings-an",
    f"{ROPE} --mtp-num-layers 1 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tmL": (
        "--mtp-num-layers 1: expected --untie-embeddings-and-output-weights beside it, or a --pipeline-model-parallel"
    ),
    f"{ROPE} --mtp-num-layers 1 --untie-embeddings-and-output-weights --pipeline-model-parallel-size 2 "
    "--pipeline-model-parallel-layout Et|tt|tm|L": "--pipeline-model-parallel-layout Et|tt|tm|L: expected m on another",
    "--mtp-hybrid-override-pattern M": "--mtp-hybrid-override-pattern M: expected --mtp-num-layers in its place",
    "--moe-paged-stash": "--moe-paged-stash True: expected no --moe-paged-stash: it needs kernels",
    "--config-logger-dir dir": "--config-logger-dir dir: expected no --config-logger-dir: Megatron cannot write",
    "--adlr-autoresume": "--adlr-autoresume True: expected no --adlr-autoresume: it needs NVIDIA's own cluster",
    "--fake-process-group": "--fake-process-group True: expected no --fake-process-group: it trains nothing",
    "--lazy-mpu-init": "--lazy-mpu-init True: expected no --lazy-mpu-init: it is another trainer's",
    "--use-ring-exchange-p2p": "--use-ring-exchange-p2p True: expected no --use-ring-exchange-p2p",
    "--init-model-with-meta-device": "--init-model-with-meta-device True: expected no --init-model-with-meta-device w",
    f"{FSDP2} --init-model-with-meta-device": "--init-model-with-meta-device True: expected no --init-model-with-meta",
    f"{FSDP2} --ckpt-format torch_dcp": "--ckpt-format torch_dcp: expected torch_dist: what Megatron saves as",
    "--fine-grained-activation-offloading --recompute-granularity full": "--fine-grained-activation-offloading True: "
    "expected --recompute-granularity selective or none beside it",
    f"{FSDP2} --load checkpoints": "--use-torch-fsdp2 True: expected --no-load-optim or --finetune beside it, with",
    "--num-experts 4 --no-bias-gelu-fusion": "--num-experts 4: expected --disable-bias-linear beside it: what",
    "--num-experts 4 --swiglu": "--num-experts 4: expected --disable-bias-linear beside it: what Megatron's local",
    "--num-experts 4 --disable-bias-linear --tensor-model-parallel-size 2": "--num-experts 4: expected "
    "--sequence-parallel beside it",
    "--num-experts 4 --disable-bias-linear --moe-router-topk 5": "--moe-router-topk 5: expected at most as many as",
    "--quick-geglu": "--quick-geglu True: expected --disable-bias-linear or --no-bias-gelu-fusion beside it",
    "--init-method-xavier-uniform": "--init-method-xavier-uniform True: expected no --init-method-xavier-uniform",
    "--lr-decay-style WSD": "--lr-decay-style WSD: expected --lr-wsd-decay-iters or --lr-wsd-decay-samples beside it",
    "--log-interval 0": "--log-interval 0: expected an integer >= 1",
    "--tensorboard-log-interval 0": "--tensorboard-log-interval 0: expected an integer >= 1",
    "--eval-interval 0": "--eval-interval 0: expected an integer >= 1",
    "--logits-save-dir logits --pipeline-model-parallel-size 2": "--logits-save-dir logits: expected no "
    "--logits-save-dir with a pipeline",
    "--full-validation": "--full-validation True: expected --multiple-validation-sets beside it, for one set too",
    "--multiple-validation-sets": "--multiple-validation-sets True: expected --full-validation beside it",
    "--validation-set-names a b": "--validation-set-names a b: expected --multiple-validation-sets beside it",
    "--save-interval 0": "--save checkpoints: expected --save-interval beside it",
    "--wandb-project p": "--wandb-project p: expected --wandb-exp-name beside it",
    "--wandb-exp-name n": "--wandb-exp-name n: expected --wandb-project beside it",
    "--async-save": f"--async-save True: expected no --async-save {NO_GPU}",
    "--log-straggler": f"--log-straggler True: expected no --log-straggler {NO_GPU}",
    "--gpu-sniff-test-interval 10": f"--gpu-sniff-test-interval 10: expected no --gpu-sniff-test-interval {NO_GPU}",
    "--record-memory-history": f"--record-memory-history True: expected no --record-memory-history {NO_GPU}",
    "--bf16 --fp32-residual-connection": "--fp32-residual-connection True: expected no --fp32-residual-connection wi",
}

#: The same, of what this entry point alone does not do, or is refused in other words with --sla.
ENTRY_POINT: dict[str, str] = {
    f"{HYBRID} --linear-attention-freq 2": f"--linear-attention-freq 2: {UNHEEDED}",
    f"{HYBRID} --heterogeneous-layers-config-path x": f"--heterogeneous-layers-config-path x: {UNHEEDED}",
    f"{HYBRID} --heterogeneous-layers-config-encoded-json {{}}": "--heterogeneous-layers-config-encoded-json {}: "
    f"{UNHEEDED}",
    "--position-embedding-type mrope --mrope-section 1 1 2": "--position-embedding-type mrope: expected rope: batches",
    "--dataloader-type external": "--dataloader-type external: expected single or cyclic",
    "--perform-rl-step": "--perform-rl-step True: expected no reinforcement learning",
    "--multi-latent-attention": f"--multi-latent-attention True: {NEEDS_TE}",
}

GRAPH = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"

#: The same, of jobs for GPUs.
ON_GPUS: dict[str, str] = {
    f"{HYBRID} --qk-layernorm": "--qk-layernorm True: expected --transformer-impl local beside it: what Megatron",
    f"{HYBRID} --spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec --qk-layernorm": (
        "--qk-layernorm True: expected --transformer-impl local beside it"
    ),
    "--hybrid-layer-pattern G-*- --transformer-impl local": "--hybrid-layer-pattern G-*-: expected layers of * - E",
    "--hybrid-layer-pattern M-*-": "--hybrid-layer-pattern M-*-: expected heads of M, 2 x --hidden-size",
    f"{HYBRID} --attention-backend local": "--attention-backend local: expected another, or --transformer-impl local",
    f"{HYBRID} --qk-l2-norm": f"--qk-l2-norm True: {UNHEEDED}",
    f"{HYBRID} {MASK}": f"{MASK} True: expected --transformer-impl local: Transformer Engine's attention is",
    MASK: f"{MASK} True: expected --transformer-impl local: Transformer Engine's attention is causal over all",
    f"{MASK} --attention-backend local --num-experts 4 --disable-bias-linear": f"{MASK} True: expected --transf",
    "--num-experts 4": "--num-experts 4: expected --disable-bias-linear or --no-bias-gelu-fusion beside it",
    f"{MASK} --transformer-impl local --bf16": f"{MASK} True: expected --no-masked-softmax-fusion beside it",
    "--transformer-impl local --fp8-format hybrid --bf16": f"--fp8-format hybrid: {NEEDS_TE}",
    "--transformer-impl local --cpu-offloading-num-layers 2": f"--cpu-offloading-num-layers 2: {NEEDS_TE}",
    f"{GRAPH} --check-for-spiky-loss": "--check-for-spiky-loss True: expected no --check-for-spiky-loss with --cuda",
    f"{GRAPH} --timing-log-level 1": "--timing-log-level 1: expected 0 with --cuda-graph-impl full_iteration",
    "--transformer-impl local --delay-wgrad-compute": f"--delay-wgrad-compute True: {NEEDS_TE}",
}

#: Package -> flags that need it, and what the line says.
PACKAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "emerging_optimizers": tuple(
        (f"--optimizer {name}", f"--optimizer {name}: expected adam or sgd: the package emerging-optimizers is not")
        for name in ("muon", "dist_muon", "adaptive_muon", "lion", "soap")
    ),
    "nvidia_resiliency_ext": (
        ("--inprocess-restart", "--inprocess-restart True: expected the package nvidia-resiliency-ext"),
        ("--enable-ft-package", "--enable-ft-package True: expected the package nvidia-resiliency-ext"),
        ("--fault-injector-ranks 0", "--fault-injector-ranks 0: expected the package nvidia-resiliency-ext"),
        (
            "--non-persistent-ckpt-type local",
            "--non-persistent-ckpt-type local: expected global, or the package nvidia",
        ),
    ),
    "wandb": (("--wandb-project p --wandb-exp-name n", "--wandb-project p: expected the package wandb, which is not"),),
    "pynvml": (("--log-energy", "--log-energy True: expected the package nvidia-ml-py, which is not installed"),),
    "workload_inspector": (
        ("--run-workload-inspector-server", "--run-workload-inspector-server True: expected the package workload-insp"),
    ),
    "transformer_engine": (
        ("--save-dgrads-interval 1", "--save-dgrads-interval 1: expected Transformer Engine, which is not installed"),
        ("--save-activations-interval 1", "--save-activations-interval 1: expected Transformer Engine, which is not"),
    ),
}

#: Package that layers of hybrid models run on -> pattern, and what the line says; they run on GPUs alone.
LAYERS_PACKAGES: dict[str, tuple[str, str]] = {
    "mamba_ssm": ("M-*-", "the package mamba-ssm for M, which is not installed"),
    "causal_conv1d": ("M-*-", "the package causal-conv1d for M, which is not installed"),
    "einops": ("M-*-", "the package einops for M, which is not installed"),
    "fla": ("G-*-", "the package flash-linear-attention for G, which is not installed"),
}

#: What looks like one of these, and is fine.
FINE = (
    f"{ROPE} --use-rope-scaling --rope-scaling-factor 32 --rotary-base 500000 --rotary-percent 0.5",
    "--use-rotary-position-embeddings --use-rope-scaling --rotary-base 500000",
    f"{MASK} --reset-position-ids --eod-mask-loss",
    f"{ROPE} {MASK} --reset-position-ids --bf16",
    f"{MASK} --core-attention sdpa --bf16",
    "--spec megatron.core.models.gpt.gpt_layer_specs get_gpt_layer_local_spec",
    "--num-experts 4 --swiglu --disable-bias-linear --moe-layer-freq 2",
    "--position-embedding-type yarn --rotary-scaling-factor 4 --mscale 2.0 --yarn-beta-fast 16",
    "--window-size 4,0 --window-attn-skip-freq 2",
    "--quick-geglu --disable-bias-linear",
    "--num-experts 4 --disable-bias-linear --qk-l2-norm",
    "--attention-backend unfused",
    "--lr-decay-style WSD --lr-wsd-decay-iters 1",
    "--full-validation --multiple-validation-sets",
    f"{ROPE} --mtp-num-layers 1",
    f"{ROPE} --mtp-num-layers 1 --untie-embeddings-and-output-weights --pipeline-model-parallel-size 2 "
    "--global-batch-size 4",
    f"{FSDP2} --load checkpoints --no-load-optim",
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*6||t*6|L --global-batch-size 4",
    f"{HYBRID} --qk-layernorm",
    f"{HYBRID} {ROPE} --rotary-base 500000",
    HYBRID_EXPERTS,
    "--hybrid-layer-pattern *-|-*-|-|* --pipeline-model-parallel-size 2 --global-batch-size 4",
    # On the CPU the stack is ours.
    "--hybrid-layer-pattern *-||*-| --pipeline-model-parallel-size 2 --global-batch-size 4",
    f"{HYBRID}* --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 --global-batch-size 4",
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For its flags' help Megatron parses its own source files; and nothing is written but here."""
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    monkeypatch.setattr(ast, "parse", functools.cache(ast.parse))
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def _world(flags: str) -> str:
    return "2" if "--pipeline-model-parallel-size 2" in flags else "1"


@pytest.fixture
def trained(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable:
    """What a training run says of a command line; ``""`` if it would start."""
    from sla_megatron.cpu.device import add_device_arg
    from sla_megatron.flags import arguments, entry_point

    def train(flags: str, own_script: bool = False) -> str:
        written: list[object] = []
        monkeypatch.setattr(arguments, "set_global_variables", written.append)
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *MODEL.split(), *flags.split()])
        monkeypatch.setenv("WORLD_SIZE", _world(flags))
        capsys.readouterr()
        check = None if own_script else entry_point.require_pretraining
        try:
            arguments.parse_and_validate_args(add_device_arg, check=check)
        except SystemExit as ended:
            assert (ended.code, written) == (2, [])
        assert list(tmp_path.iterdir()) == []
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) <= 1 and bool(lines) != bool(written)
        return lines[0].removeprefix("sla-megatron: error: ") if lines else ""

    return train


@pytest.fixture
def examined(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """What the doctor says of a job's command line; ``""`` if it finds nothing against it."""
    from sla_megatron.commands.doctor.finding import Fault
    from sla_megatron.commands.doctor.job import job_args
    from sla_megatron.commands.doctor.place import Place

    def examine(flags: str, on_cpu: bool = True) -> str:
        monkeypatch.setattr(sys, "argv", ["sla-doctor", *MODEL.split(), *flags.split()])
        try:
            job_args(Place(0, 1, 0, "here", launched=False), None, on_cpu=on_cpu)
        except Fault as fault:
            return str(fault)
        finally:
            assert list(tmp_path.iterdir()) == []
        return ""

    return examine


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(trained: Callable[..., str], examined: Callable[..., str], flags: str) -> None:
    """By training, by the doctor, and with --sla in a script of one's own."""
    for line in (trained(flags), examined(flags), trained(f"--sla {flags}", own_script=True)):
        assert line.startswith(REFUSED[flags])


@pytest.mark.parametrize("flags", ENTRY_POINT)
def test_refused_by_the_entry_point(trained: Callable[..., str], examined: Callable[..., str], flags: str) -> None:
    assert trained(flags).startswith(ENTRY_POINT[flags])
    assert examined(flags).startswith(ENTRY_POINT[flags])


@pytest.mark.parametrize("flags", ON_GPUS)
def test_refused_for_gpus(examined: Callable[..., str], flags: str) -> None:
    assert examined(flags, on_cpu=False).startswith(ON_GPUS[flags])
    assert examined(f"--sla {flags}", on_cpu=False)


def test_megatrons_hybrid_model_has_no_local_layers(examined: Callable[..., str]) -> None:
    """On a GPU it takes Transformer Engine's whatever the flag says; ours does not, nor a model of ours on the CPU."""
    local = f"{HYBRID} --transformer-impl local"
    assert examined(local, on_cpu=False).startswith(
        "--transformer-impl local: expected transformer_engine without --sla"
    )
    assert [examined(f"{local} {ours}", on_cpu=False) for ours in ("--sla", "--core-attention sdpa")] == ["", ""]


@pytest.mark.parametrize("flags", ["--gpu-sniff-test-interval 10", "--record-memory-history"])
def test_a_gpus_run_is_planned_without_one(examined: Callable[..., str], flags: str) -> None:
    """What only a GPU does is refused of a run on this machine, not of one on another."""
    assert "without a GPU" in examined(flags)
    assert examined(flags, on_cpu=False) == ""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_missing(
    trained: Callable[..., str], examined: Callable[..., str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    for flags, line in PACKAGES[package]:
        assert trained(flags).startswith(line)
        assert examined(flags).startswith(line)
        assert trained(f"--sla {flags}", own_script=True).startswith(line)


def test_a_package_that_is_there(trained: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: find("json" if name in PACKAGES else name, *more)
    )
    for flags, line in (row for rows in PACKAGES.values() for row in rows):
        assert "not installed" not in trained(flags), line


def _find_packages(patch: pytest.MonkeyPatch, missing: str | None) -> None:
    """All packages of layers are found but ``missing``."""
    find = importlib.util.find_spec
    found = {name: None if name == missing else find("json") for name in LAYERS_PACKAGES}
    patch.setattr(
        importlib.util, "find_spec", lambda name, *more: found.get(name) if name in found else find(name, *more)
    )


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ("", True),
        (" --sla", False),
        (" --core-attention sdpa --transformer-impl local", False),
    ],
)
def test_stages_without_layers_of_megatrons_own_stack(examined: Callable[..., str], more: str, refused: bool) -> None:
    """Where it is ours, as with ``--sla`` and ``--core-attention sdpa``, they are fine; so are those at the ends."""
    flags = "--pipeline-model-parallel-size 2 --global-batch-size 4 --hybrid-layer-pattern"
    line = examined(f"{flags} *-||*-|{more}", on_cpu=False)
    said = "--hybrid-layer-pattern *-||*-|: expected a layer in each stage between others without --sla"
    assert line.startswith(said) if refused else line == ""
    assert examined(f"{flags} |*-|*-|{more}", on_cpu=False) == ""


@pytest.mark.parametrize("package", LAYERS_PACKAGES)
def test_a_package_of_layers_that_is_missing(
    examined: Callable[..., str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """Of Megatron's own layers: a specification of one's own may have others."""
    pattern, needed = LAYERS_PACKAGES[package]
    heads = "--mamba-num-heads 8"
    _find_packages(monkeypatch, package)
    for sla in ("", "--sla "):
        line = examined(f"{sla}{heads} --hybrid-layer-pattern {pattern}", on_cpu=False)
        assert line == f"--hybrid-layer-pattern {pattern}: expected {needed}"
    spec = "--spec megatron.core.models.gpt.gpt_layer_specs get_gpt_layer_local_spec"
    assert examined(f"--hybrid-layer-pattern {pattern} {spec}", on_cpu=False) == ""
    _find_packages(monkeypatch, None)
    assert examined(f"{heads} --hybrid-layer-pattern {pattern}", on_cpu=False) == ""


@pytest.mark.parametrize("flags", FINE)
def test_not_refused(trained: Callable[..., str], examined: Callable[..., str], flags: str) -> None:
    assert (trained(flags), examined(flags), trained(f"--sla {flags}", own_script=True)) == ("", "", "")


def test_a_script_of_ones_own_is_left_alone(trained: Callable[..., str]) -> None:
    """Without --sla: it may heed what Megatron's builder does not."""
    assert [trained(flags, own_script=True) for flags in ("--freeze-all-layers", "--rotary-base 500000")] == ["", ""]


def test_yaml_in_the_place_of_flags(trained: Callable[..., str], examined: Callable[..., str], tmp_path: Path) -> None:
    yaml = tmp_path.parent / "flags.yaml"
    yaml.write_text("language_model:\n  num_layers: 2\n")
    line = f"--yaml-cfg {yaml}: expected flags in its place"
    assert (trained(f"--yaml-cfg {yaml}"), examined(f"--yaml-cfg {yaml}")) == (line, line)
    assert trained(f"--yaml-cfg {yaml}", own_script=True) == line


def test_rows_name_flags_and_their_defaults(quick: None) -> None:
    """Every row is of a flag that Megatron's parser has, spelled so; nothing is refused that nobody gave."""
    from megatron.training.arguments import add_megatron_arguments

    from sla_megatron.common.errors import flag_of
    from sla_megatron.flags.needed import AT_START, NOT_INSTALLED
    from sla_megatron.flags.unhonoured import ROWS

    parser = ArgumentParser()
    add_megatron_arguments(parser)
    flags = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    assert [row.name for row in (*ROWS, *NOT_INSTALLED, *AT_START) if flags.get(flag_of(row.name)) != row.name] == []
    default = parser.parse_args([])
    always = [row for row in (*ROWS, *NOT_INSTALLED)]
    shown = {row.name: getattr(default, row.name) for row in always}
    assert {name for row in always if getattr(value := shown[name := row.name], "name", value) not in row.fine} == set()


def test_what_no_layer_heeds(quick: None) -> None:
    """That nothing of Megatron's reads these is seen in its sources: where one does one day, the row goes."""
    import megatron.core
    import megatron.training

    dead = (
        "apply_residual_connection_post_layernorm",
        "openai_gelu",
        "onnx_safe",
        "exit_signal_handler_for_dataloader",
    )
    package = Path(megatron.training.__file__).parents[1]
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    read = {name: [path for path, text in sources.items() if f".{name}" in text] for name in dead}
    assert read == {name: [] for name in dead}
