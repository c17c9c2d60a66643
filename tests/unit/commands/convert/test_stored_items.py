"""What is read without torch is what torch reads; what is not known is left to torch, and nothing of it is called."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sla_megatron.commands.convert.checkpoint_arguments import SettingsUnpickler, Unknown
from sla_megatron.commands.convert.stored_items import UnfamiliarError, read_tensor
from sla_megatron.common.checkpoint_folders import common_state


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


TENSORS = {
    **{
        str(dtype): values(3, 5, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    },
    "of one row": values(7),
    "of more dimensions": values(2, 3, 4),
    "rows of a larger one": values(9, 4)[2:5],
    "with a gradient": values(3, 4).requires_grad_(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_anywhere_in_a_file(name: str, tmp_path: Path) -> None:
    """At a place that no page and no number begins at, between other items."""
    file, content = tmp_path / "file", saved(TENSORS[name])
    before = saved(values(700, dtype=torch.float64)) + b"x" * 13
    file.write_bytes(before + content + saved(values(2)))
    found = read_tensor(file, len(before), len(content))
    expected = torch.load(io.BytesIO(content), weights_only=True)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


class Calls:
    """Whoever unpickles it as pickle does makes a folder."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("called",)


class Many(list):
    """Is pickled with what is in it."""


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is not known here nothing is called."""
    monkeypatch.chdir(tmp_path)
    settings = Namespace(
        a=1, dtype=torch.bfloat16, nested=SimpleNamespace(path=Path("x")), empty=None, many=[{"b": 2.5}]
    )
    (tmp_path / "common.pt").write_bytes(
        saved({"args": settings, "code": Calls(), "tensor": values(3), "many": Many([1])})
    )
    found = common_state(tmp_path, SettingsUnpickler)
    assert found.pop("args") == settings
    assert [type(value) for value in found.values()] == [Unknown] * 3 and not (tmp_path / "called").exists()


def compressed(content: bytes) -> bytes:
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as given, zipfile.ZipFile(found, "w", zipfile.ZIP_DEFLATED) as made:
        for name in given.namelist():
            made.writestr(name, given.read(name))
    return found.getvalue()


UNFAMILIAR = {
    "columns": saved(values(4, 6).T),
    "nothing": saved(values(0, 4)),
    "integers": saved(torch.arange(6)),
    "sparse": saved(values(3, 3).to_sparse()),
    "no tensor": saved({"a": 1}),
    "code": saved(Calls()),
    "the old format": pickle.dumps(Calls()),
    "compressed": compressed(saved(values(50, 50))),
    "cut off": saved(values(50, 50))[:-100],
    "without its end": saved(values(50, 50))[:5000],
    "nothing at all": b"",
    "text": b"x" * 1000,
}


@pytest.mark.parametrize("name", UNFAMILIAR)
def test_anything_else_is_left_to_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_bytes(UNFAMILIAR[name])
    with pytest.raises(UnfamiliarError):
        read_tensor(file, 0, len(UNFAMILIAR[name]))
    assert not (tmp_path / "called").exists()


def test_a_file_that_is_shorter_than_it_should_be(tmp_path: Path) -> None:
    content = saved(values(9, 9))
    (tmp_path / "file").write_bytes(content[:-1])
    with pytest.raises(UnfamiliarError, match="is shorter"):
        read_tensor(tmp_path / "file", 0, len(content))
