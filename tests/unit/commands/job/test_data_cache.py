"""Megatron's data cache: in the run's folder, where the data may not be written; and mended when it was cut off."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest

from sla_megatron.commands.job.additions import additions
from sla_megatron.commands.job.data_cache import set_aside_cut_off
from tests.support.indexed_files import write_indexed

NOBODY = 65534


@contextmanager
def as_somebody() -> Iterator[None]:
    """Within the block, a user whom the modes of files bind: root they do not."""
    if os.getuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where anybody may look, unlike pytest's own."""
    made = Path(tempfile.mkdtemp(prefix="data-cache-"))
    made.chmod(0o755)
    yield made
    (made / "data").chmod(0o755)
    shutil.rmtree(made)


def samples(prefix: str, cache: str | None) -> list[list[int]]:
    """All of what Megatron makes of the data set to train on, in its order."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=5,
        sequence_length=16,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [90, 0, 0], lambda: True, config).build()
    return [train[number]["tokens"].tolist() for number in range(90)]


class Tokenizer:
    """As much of one as Megatron asks."""

    eod, pad, vocab_size, unique_identifiers = 0, -1, 100, {"class": "none"}


@pytest.mark.usefixtures("megatron")
def test_data_that_may_not_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the flag that the chain adds Megatron cannot start on them; with it it reads what it would have."""
    (folder / "data").mkdir()
    (folder / "run").mkdir(mode=0o777)
    (folder / "run").chmod(0o777)
    prefix = write_indexed(folder / "data" / "text", 60)
    found = additions(folder / "run", ["--data-path", prefix, "--tensorboard-dir", "x"], lambda flag: True).flags
    (flag, cache) = found
    assert flag == "--data-cache-path"
    expected = samples(prefix, None)
    shutil.rmtree(folder / "data" / "text")
    (folder / "data").chmod(0o555)
    with as_somebody():
        with pytest.raises(PermissionError):
            samples(prefix, None)
        assert samples(prefix, cache) == expected
        assert len(list(Path(cache).iterdir())) == 4


@pytest.mark.usefixtures("megatron")
def test_a_cache_that_was_cut_off(tmp_path: Path) -> None:
    """By a kill while it was written: Megatron itself believes it and ends; set aside, it is built anew, the same."""
    run, said = tmp_path, []
    prefix, cache = write_indexed(tmp_path / "text", 60), str(tmp_path / "data-cache")
    set_aside_cut_off(run, said.append)
    expected = samples(prefix, cache)
    set_aside_cut_off(run, said.append)
    assert said == []
    arrays: dict[str, Any] = {path.name: numpy.load(path) for path in Path(cache).glob("*.npy")}
    assert len(arrays) == 3
    for name in arrays:
        content = (Path(cache) / name).read_bytes()
        for left in (0, 7, 60, len(content) - 1):
            (Path(cache) / name).write_bytes(content[:left])
            if left:
                with pytest.raises(ValueError):
                    samples(prefix, cache)
            set_aside_cut_off(run, said.append)
            assert said.pop().startswith(f"{Path(cache) / name} is cut off: it is now incomplete_{name}_")
            assert samples(prefix, cache) == expected
        assert (numpy.load(Path(cache) / name) == arrays[name]).all()
    assert said == []
