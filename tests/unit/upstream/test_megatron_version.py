"""Which Megatron is accepted, and what is said of another."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import pytest

from sla_megatron.cpu.device import megatron_device
from sla_megatron.upstream.megatron_version import require_megatron
from sla_megatron.upstream.seams import SeamError


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands for the ``package_info.py`` of the Megatron that would be imported; it is not written yet."""
    spec = importlib.machinery.ModuleSpec("megatron.core", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(
        "sla_megatron.upstream.megatron_version.importlib.util.find_spec", lambda name: {"megatron.core": spec}[name]
    )
    return tmp_path / "package_info.py"


def package_info(version: str) -> str:
    """What Megatron's file says of ``version``, as its releases write it."""
    *numbers, pre_release = (*version.split(".")[:2], version.split(".")[2][0], version.split(".")[2][1:])
    fields = "".join(f"{name} = {number}\n" for name, number in zip(("MAJOR", "MINOR", "PATCH"), numbers, strict=True))
    return f"{fields}PRE_RELEASE = '{pre_release}'\nVERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)\nimport os as _os\n"


@pytest.mark.parametrize("found", ["0.19.0", "0.19.2", "0.19.0rc1", "0.20.0"])
def test_a_supported_megatron(importable: Path, found: str) -> None:
    """Any 0.19 will do, and 0.20 in development."""
    importable.write_text(package_info(found))
    assert require_megatron() == found


@pytest.mark.parametrize("found", ["0.18.2", "0.21.0", "1.19.0", "0.190.0"])
def test_another_megatron_is_refused(importable: Path, capsys: pytest.CaptureFixture, found: str) -> None:
    """At start, with one line that names the file, its version and those that are supported."""
    importable.write_text(package_info(found))
    with pytest.raises(SystemExit) as ended, megatron_device(["--device", "cpu"]):
        pass
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    where = importable.with_name("__init__.py")
    assert err.startswith(f"sla-megatron: error: {where}: Megatron {found}, supported: 0.19.x (")


@pytest.mark.parametrize("text", ["MAJOR = 0\nMINOR = 19\n", "MAJOR = 0; MINOR = 'x'; PATCH = 1\n", "def (", ""])
def test_a_megatron_that_does_not_say_its_version_is_refused(importable: Path, text: str) -> None:
    """It is not taken for a supported one."""
    importable.write_text(text)
    with pytest.raises(SeamError, match="Megatron of no known version, supported: 0.19.x"):
        require_megatron()


def test_a_megatron_without_the_file_is_refused(importable: Path) -> None:
    """The error names the file."""
    with pytest.raises(SeamError, match="package_info.py: cannot be read"):
        require_megatron()


def test_a_missing_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to install it."""

    def find_spec(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("sla_megatron.upstream.megatron_version.importlib.util.find_spec", find_spec)
    with pytest.raises(SeamError, match=r"pip install 'megatron-core\[training\]==0\.19"):
        require_megatron()


@pytest.mark.parametrize(("version", "fits"), [("0.4.1", False), ("0.5.0", False), ("0.6.0", True), ("1.0.0", True)])
def test_a_resiliency_package_that_megatron_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    """Megatron 0.19 asks for 0.6.0 when it is imported; version 0.4.1 was seen to end that in an AttributeError."""
    folder = tmp_path / f"nvidia_resiliency_ext-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    if fits:
        require_megatron()
        return
    with pytest.raises(SeamError, match=f"nvidia-resiliency-ext {version} is installed: Megatron needs 0.6"):
        require_megatron()
