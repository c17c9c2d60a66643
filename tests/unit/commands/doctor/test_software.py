"""What ``sla-doctor`` says of an environment, such as a container's image: packages, kernels and tools, by name."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sla_megatron.commands.doctor import software, versions
from sla_megatron.commands.doctor.finding import FAIL, OK, SKIP, WARN, found
from sla_megatron.common.requirements import Package, installed

EVERYTHING = {"bash", "gcc", "clang", "nvidia-smi", "make", "g++", "python3-config"}


@pytest.mark.parametrize(
    ("lacks", "old", "status", "says"),
    [
        ([], {}, OK, "all that is asked for is there"),
        (
            ["datasets"],
            {},
            FAIL,
            "sla-megatron asks for datasets: expected what launch/install-beside.sh would install",
        ),
        ([], {"transformers": "4.57.0"}, FAIL, "sla-megatron asks for transformers>=5.4 and finds 4.57.0"),
        (["xxhash", "omegaconf"], {}, WARN, " asks for xxhash"),
        (["xxhash", "omegaconf"], {}, WARN, " asks for omegaconf"),
        # A checkout of Megatron-LM on the path is no package; another check says what it is.
        (["megatron-core"], {}, OK, "all that is asked for is there"),
        # torch's own needs are torch's.
        (["triton", "nvidia-nccl-cu13"], {}, OK, "all that is asked for is there"),
    ],
)
def test_packages(lacks: list[str], old: dict[str, str], status: str, says: str) -> None:
    """A need of this project fails where it is not met; a need of what it needs is a doubt."""
    there: dict[str, Package] = {name: package for name, package in installed().items() if name not in lacks}
    there |= {name: replace(there[name], version=version) for name, version in old.items()}
    finding = found("packages", software.packages, there)
    assert finding.status == status and says in finding.text, finding


def which(*without: str) -> Callable[[str], str | None]:
    return lambda name: None if name in without or name not in EVERYTHING else f"/bin/{name}"


@pytest.mark.parametrize(
    ("device", "without", "status", "says"),
    [
        ("cpu", [], OK, "commands are there"),
        ("cpu", ["gcc", "clang", "nvidia-smi"], OK, "commands are there"),
        ("cpu", ["bash"], WARN, "not found: bash: launch/slurm.sbatch starts ranks with it"),
        ("cuda", [], OK, "compilers and commands are there"),
        ("cuda", ["gcc"], OK, "compilers and commands are there"),
        ("cuda", ["gcc", "clang"], FAIL, "not found: gcc or clang (or CC=): Triton compiles the launchers"),
        ("cuda", ["nvidia-smi"], WARN, "not found: nvidia-smi: sla-job health calls it"),
        # It comes with the wheel.
        ("cuda", ["make", "g++"], OK, "compilers and commands are there"),
    ],
)
def test_tools(device: str, without: list[str], status: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run ends without fails; what only a container's runtime brings, or a launcher needs, is a doubt."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(software, "_loads", lambda library: True)
    finding = found("tools", software.tools, device, which(*without))
    assert finding.status == status and says in finding.text, finding


def test_a_library_that_is_not_there() -> None:
    """Asked of the loader, as torch's is."""
    assert software._loads("libc.so.6") and not software._loads("libcuda-of-nobody.so.1")


def test_python_without_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton looks for them where this Python says that they are."""
    monkeypatch.setattr(software, "_loads", lambda library: True)
    monkeypatch.setattr(software.sysconfig, "get_paths", lambda scheme: {"include": "/none"})
    assert "/none/Python.h (python3-dev)" in found("tools", software.tools, "cuda", which()).text


def test_what_compiles_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout calls make at each start; what make calls is needed until the helpers are compiled."""
    datasets = tmp_path / "megatron" / "core" / "datasets"
    datasets.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert found("tools", software.tools, "cpu", which("make")).status == OK
    (datasets / "Makefile").touch()
    finding = found("tools", software.tools, "cpu", which("make", "g++"))
    assert finding.status == FAIL
    assert f"make: {datasets} is compiled at each start; g++: {datasets}" in finding.text
    (datasets / "helpers_cpp.cpython-312-x86_64-linux-gnu.so").touch()
    assert found("tools", software.tools, "cpu", which("g++")).status == OK


@pytest.mark.parametrize(
    ("there", "status", "flags"),
    [
        (
            [],
            WARN,
            "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm "
            "--no-masked-softmax-fusion --no-rope-fusion",
        ),
        (["transformer_engine"], OK, "--no-gradient-accumulation-fusion"),
        (
            ["apex", "fused_weight_gradient_mlp_cuda", "scaled_masked_softmax_cuda"],
            WARN,
            "--transformer-impl local --no-persist-layer-norm --no-rope-fusion",
        ),
        # Apex's extensions are chosen when it is built.
        (["transformer_engine", "apex"], OK, "--no-gradient-accumulation-fusion"),
        (["transformer_engine", "apex", "fused_weight_gradient_mlp_cuda"], OK, ""),
    ],
)
def test_flags_that_go_with_what_is_there(
    there: list[str], status: str, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both, by version, and what a script of one's own is given; on a processor neither is looked for."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(versions, "installed_version", lambda distribution, module: "1.0" if module in there else None)
    finding = found("kernels", versions.kernels, "cuda")
    assert finding.status == status
    assert finding.text.partition("is given")[2].rpartition("is given ")[2].strip() == flags, finding
    assert found("kernels", versions.kernels, "cpu").status == SKIP


def test_they_are_those_that_the_entry_point_gives(
    megatron: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Where neither is installed: what upstream's own modules say that they did not find, it switches off."""
    from sla_megatron.flags.fused_kernels import switch_off_missing_kernels

    args = Namespace(
        transformer_impl="local",
        normalization="LayerNorm",
        core_attention="megatron",
        position_embedding_type="rope",
        use_rotary_position_embeddings=False,
        multi_latent_attention=False,
        gradient_accumulation_fusion=True,
        no_persist_layer_norm=False,
        masked_softmax_fusion=True,
        apply_rope_fusion=True,
    )
    before = vars(args).copy()
    switch_off_missing_kernels(args)
    names = {"apply_rope_fusion": "--no-rope-fusion", "no_persist_layer_norm": "--no-persist-layer-norm"}
    changed = [name for name, value in vars(args).items() if value != before[name]]
    switched = {names.get(name, "--no-" + name.replace("_", "-")) for name in changed}
    assert switched == set(versions.flags_without_kernels()) - {"--transformer-impl local"}
