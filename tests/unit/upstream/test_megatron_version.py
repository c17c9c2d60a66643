"""Which Megatron is accepted, and what is said of another."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import pytest

from sla_megatron.cpu.device import megatron_device
from sla_megatron.upstream.megatron_version import megatron_flavour, require_megatron
from sla_megatron.upstream.seams import SeamError

#: What a line of development has of the names that tell them apart, which are in these files.
MAIN = {"pipeline_parallel/schedules.py": "def _build_default_pg_collection():\n", "transformer/attention.py": ""}
DEV = {"pipeline_parallel/schedules.py": "", "transformer/attention.py": "def get(self, head_wise_gate=False):\n"}


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands for the ``package_info.py`` of the Megatron that would be imported; it is not written yet."""
    spec = importlib.machinery.ModuleSpec("megatron.core", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(
        "sla_megatron.upstream.megatron_version.importlib.util.find_spec", lambda name: {"megatron.core": spec}[name]
    )
    write_sources(tmp_path, MAIN)
    return tmp_path / "package_info.py"


def write_sources(core: Path, sources: dict[str, str]) -> None:
    for file, text in sources.items():
        (core / file).parent.mkdir(exist_ok=True)
        (core / file).write_text(text)


def package_info(version: str) -> str:
    """What Megatron's file says of ``version``, as its releases write it."""
    *numbers, pre_release = (*version.split(".")[:2], version.split(".")[2][0], version.split(".")[2][1:])
    fields = "".join(f"{name} = {number}\n" for name, number in zip(("MAJOR", "MINOR", "PATCH"), numbers, strict=True))
    return f"{fields}PRE_RELEASE = '{pre_release}'\nVERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)\nimport os as _os\n"


@pytest.mark.parametrize(
    ("found", "sources", "line"),
    [
        ("0.19.0", MAIN, "0.19"),
        ("0.19.2", MAIN, "0.19"),
        ("0.19.0rc1", MAIN, "0.19"),
        ("0.20.0", MAIN, "0.20"),
        ("0.19.0", DEV, "dev"),
    ],
)
def test_a_supported_megatron(importable: Path, found: str, sources: dict[str, str], line: str) -> None:
    """Any 0.19 will do, 0.20 in development, and dev, which says a version that it is not."""
    importable.write_text(package_info(found))
    write_sources(importable.parent, sources)
    assert require_megatron() == found
    assert megatron_flavour().name == line


@pytest.mark.parametrize("found", ["0.18.2", "0.21.0", "1.19.0", "0.190.0"])
def test_another_megatron_is_refused(importable: Path, capsys: pytest.CaptureFixture, found: str) -> None:
    """At start, with one line that names the file, its version and those that are supported."""
    importable.write_text(package_info(found))
    assert_refused(capsys, importable, f"Megatron {found}, supported: 0.19.x (")


@pytest.mark.parametrize(
    ("sources", "is_like"),
    [
        (MAIN | {"transformer/attention.py": DEV["transformer/attention.py"]}, "has head_wise_gate"),
        (DEV | {"transformer/attention.py": ""}, "lacks _build_default_pg_collection"),
    ],
    ids=["both", "neither"],
)
@pytest.mark.parametrize("found", ["0.19.0", "0.20.0"])
def test_a_megatron_between_the_lines_is_refused(
    importable: Path, capsys: pytest.CaptureFixture, found: str, sources: dict[str, str], is_like: str
) -> None:
    """Its version is a supported one, its sources are not: the line says what they have or lack."""
    importable.write_text(package_info(found))
    write_sources(importable.parent, sources)
    assert_refused(capsys, importable, f"Megatron {found}, but ", is_like)


def assert_refused(capsys: pytest.CaptureFixture, package_info: Path, says: str, *parts: str) -> None:
    with pytest.raises(SystemExit) as ended, megatron_device(["--device", "cpu"]):
        pass
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"sla-megatron: error: {package_info.with_name('__init__.py')}: {says}")
    assert all(part in err for part in (*parts, "supported: 0.19.x (", "dev ("))


@pytest.mark.parametrize("text", ["MAJOR = 0\nMINOR = 19\n", "MAJOR = 0; MINOR = 'x'; PATCH = 1\n", "def (", ""])
def test_a_megatron_that_does_not_say_its_version_is_refused(importable: Path, text: str) -> None:
    """It is not taken for a supported one."""
    importable.write_text(text)
    with pytest.raises(SeamError, match="Megatron of no known version, supported: 0.19.x"):
        require_megatron()


def test_a_megatron_without_the_file_is_refused(importable: Path) -> None:
    """The error names the file, this one or another that is looked into."""
    with pytest.raises(SeamError, match="package_info.py: cannot be read"):
        require_megatron()
    importable.write_text(package_info("0.19.0"))
    (importable.parent / "transformer/attention.py").unlink()
    with pytest.raises(SeamError, match="transformer/attention.py: cannot be read"):
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
