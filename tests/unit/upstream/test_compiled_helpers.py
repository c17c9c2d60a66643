"""The wheel without its Makefile: which build step is skipped, and which is not."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def datasets_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Where ``compiled_helpers.py`` looks: an empty folder, with or without compiled helpers."""
    folder = SimpleNamespace(path=tmp_path, has_helpers=True)

    def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
        if name.endswith("helpers_cpp"):
            return importlib.machinery.ModuleSpec(name, None) if folder.has_helpers else None
        found = importlib.machinery.ModuleSpec(name, None, is_package=True)
        found.submodule_search_locations.append(str(tmp_path))
        return found

    monkeypatch.setattr("sla_megatron.upstream.compiled_helpers.importlib.util.find_spec", find_spec)
    return folder


def targets() -> list[str]:
    """What ``missing_makefile_seams`` would replace."""
    from sla_megatron.upstream.compiled_helpers import missing_makefile_seams

    return [seam.target for seam in missing_makefile_seams()]


def test_the_wheel_s_build_step_is_skipped(datasets_folder: SimpleNamespace) -> None:
    """Compiled helpers without a Makefile: nothing to make."""
    assert targets() == ["megatron.core.datasets.utils:compile_helpers"]


def test_a_checkout_s_build_step_is_left_alone(datasets_folder: SimpleNamespace) -> None:
    """A Makefile is there: upstream's step works."""
    (datasets_folder.path / "Makefile").touch()
    assert targets() == []


def test_a_missing_build_is_not_hidden(datasets_folder: SimpleNamespace) -> None:
    """Neither helpers nor Makefile: upstream's own error is the right one."""
    datasets_folder.has_helpers = False
    assert targets() == []
