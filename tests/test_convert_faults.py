"""What goes wrong: one line that names it, a non-zero exit, nothing under the result's name, the source untouched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sla_megatron.commands.convert import cli, progress
from tests.support.convert_models import save_random_checkpoint
from tests.support.launch import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint ``megatron`` and its export ``hf``."""
    from sla_megatron.commands.convert.commands import megatron_to_hf, open_megatron

    folder = tmp_path_factory.mktemp("good")
    save_random_checkpoint(folder / "megatron", {"sla": True, "sla_skip_distance": [3]})
    megatron_to_hf(open_megatron(folder / "megatron"), folder / "hf")
    return folder


@pytest.fixture
def convert(
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    convert_streams: Callable[..., tuple[int, str, str]],
) -> Callable[..., str]:
    """``sla-convert`` on a copy of the good folders that may be broken first; returns its one line."""
    shutil.copytree(good, tmp_path / "copy")

    def run(*command: str) -> str:
        before = _fingerprint(tmp_path)
        monkeypatch.chdir(tmp_path)
        status, _, err = convert_streams(*command)
        assert status == 2
        assert _fingerprint(tmp_path) == before, "nothing was written, nothing else changed"
        (line,) = [line for line in err.splitlines() if line.startswith("sla-convert")]
        return line

    return run


def _fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def _metadata(step: Path) -> Iterator[dict]:
    """The stored tensors of a checkpoint, to be changed."""
    path = step / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    yield metadata.state_dict_metadata
    path.write_bytes(pickle.dumps(metadata))


STEP = Path("copy/megatron/iter_0000007")
TO_HF = ("megatron-to-hf", "copy/megatron", "out")
FC2 = "decoder.layers.mlp.linear_fc2.weight"


def test_a_truncated_shard(convert: Callable[..., str], tmp_path: Path) -> None:
    for shard in (tmp_path / STEP).glob("*.distcp"):
        os.truncate(shard, shard.stat().st_size // 2)
    line = convert(*TO_HF)
    assert "cannot be read" in line


def test_a_missing_shard(convert: Callable[..., str], tmp_path: Path) -> None:
    for shard in (tmp_path / STEP).glob("*.distcp"):
        shard.unlink()
    assert "cannot be read" in convert(*TO_HF)


def test_a_missing_tensor(convert: Callable[..., str], tmp_path: Path) -> None:
    with _metadata(tmp_path / STEP) as stored:
        del stored[FC2]
    assert f"{FC2.replace('layers.', 'layers.0.')} (model.layers.0.mlp.down_proj.weight) is missing" in convert(*TO_HF)


def test_an_unknown_tensor(convert: Callable[..., str], tmp_path: Path) -> None:
    with _metadata(tmp_path / STEP) as stored:
        stored["decoder.layers.mlp.router.weight"] = stored[FC2]
    assert "tensor decoder.layers.mlp.router.weight is not part of this architecture" in convert(*TO_HF)


def test_shards_that_do_not_cover_a_tensor(convert: Callable[..., str], tmp_path: Path) -> None:
    """As if one tensor-parallel rank's part were missing."""
    with _metadata(tmp_path / STEP) as stored:
        stored[FC2].chunks.pop()
    assert f"the shards of {FC2} hold" in convert(*TO_HF)


def test_a_tensor_of_another_size(convert: Callable[..., str], tmp_path: Path) -> None:
    """As if it had been saved for another tensor-parallel size than its metadata say."""
    with _metadata(tmp_path / STEP) as stored:
        tensor = stored[FC2]
        half = tensor.size[2] // 2
        tensor.size = type(tensor.size)((*tensor.size[:2], half))
        for chunk in tensor.chunks:
            chunk.sizes = type(chunk.sizes)((*chunk.sizes[:2], half))
    assert f"tensor {FC2} has shape" in convert(*TO_HF)


def test_a_checkpoint_that_is_not_complete(convert: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / STEP / "metadata.json").unlink()
    assert "or not a complete one" in convert(*TO_HF)


def test_no_checkpoint(convert: Callable[..., str]) -> None:
    assert "copy/nothing: no such checkpoint folder" in convert("megatron-to-hf", "copy/nothing", "out")


def test_an_option_that_the_format_lacks(convert: Callable[..., str]) -> None:
    line = convert(*TO_HF, "--override", "softmax_type='learnable'")
    assert "--softmax-type learnable: the Hugging Face format has no field for it" in line


def test_an_existing_result(convert: Callable[..., str], tmp_path: Path) -> None:
    assert "copy/hf exists: expected a new folder, or --overwrite" in convert(
        "megatron-to-hf", "copy/megatron", "copy/hf"
    )
    assert "exists" in convert("hf-to-megatron", "copy/hf", "copy/megatron")


def test_a_truncated_safetensors_file(convert: Callable[..., str], tmp_path: Path) -> None:
    weights = tmp_path / "copy/hf/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert "model.safetensors cannot be read" in convert("hf-to-megatron", "copy/hf", "out")


def test_a_config_of_another_model(convert: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "copy/hf/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "model.layers.0.mlp.up_proj.weight has shape (128, 32)" in convert("hf-to-megatron", "copy/hf", "out")
    path.write_text(json.dumps(config | {"model_type": "mamba"}))
    line = convert("hf-to-megatron", "copy/hf", "out")
    assert "model_type mamba: expected sla_gpt, llama, mistral, qwen2, qwen3, gpt2" in line


def test_a_sliding_window(convert: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "copy/hf/config.json"
    path.write_text(json.dumps({"model_type": "mistral", "sliding_window": 8}))
    assert "sliding_window 8: expected none" in convert("hf-to-megatron", "copy/hf", "out")


def test_a_full_disk(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """On a file system of 64 KiB: one line, and nothing is left on it."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        monkeypatch.setattr(sys, "argv", ["sla-convert", "megatron-to-hf", str(good / "megatron"), str(small / "out")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert "cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err.splitlines()[-1]
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_lines_while_megatron_writes(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Which says nothing of it itself."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.002)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["sla-convert", "hf-to-megatron", str(good / "hf"), str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert (ended.value.code, lines[0]) == (0, f"reading {good / 'hf'}")
    # The model has 0.2 MB.
    shown = [re.match(rf"writing {re.escape(str(out))}: (\d+)%, .* of 2\d\dk,", line) for line in lines]
    percents = [int(match[1]) for match in shown if match]
    assert percents[0] == 0 and percents == sorted(percents) and percents[-1] > 0


def test_sigkill(tmp_path: Path) -> None:
    """A conversion that is killed while it writes leaves no result under its name, and the source as it was."""
    from sla_megatron.commands.convert.commands import megatron_to_hf, open_megatron

    source, out = tmp_path / "megatron", tmp_path / "out"
    # Large enough that it is still writing when it is killed.
    save_random_checkpoint(source, {"num_layers": 24, "hidden_size": 256, "ffn_hidden_size": 2048})
    before = _fingerprint(source)
    process = subprocess.Popen(
        [sys.executable, "-m", "sla_megatron.commands.convert.cli", "megatron-to-hf", str(source), str(out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.unfinished-*/model*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert _fingerprint(source) == before
    # The next attempt is not in its way.
    megatron_to_hf(open_megatron(source), out)
    assert (out / "config.json").exists()
