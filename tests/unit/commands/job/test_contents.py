"""What a look into a checkpoint finds: torch's own writer made each, and its own loader says what is in it."""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from sla_megatron.common.checkpoint_contents import PIECE, damage, size
from sla_megatron.training.checkpoint_writer import results_here
from sla_megatron.upstream.seams import replaced

pytestmark = pytest.mark.filterwarnings("ignore")

#: What a trainer may store a tensor as.
FLOATS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool]


def write(folder: Path, state: dict[str, Any]) -> Path:
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    """As many as ``dtype`` has, from its largest to its least."""
    ramp = torch.linspace(-1, 1, count, dtype=torch.float64)
    if dtype in OTHERS:
        return (ramp * 100).to(dtype) if dtype.is_signed else (ramp * 100).abs().to(dtype)
    return (ramp * (torch.finfo(dtype).max if dtype != torch.float8_e8m0fnu else 1)).to(dtype)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = {str(dtype): numbers(301, dtype).reshape(7, 43) for dtype in FLOATS + OTHERS}
    state |= {
        "large": torch.arange(PIECE, dtype=torch.float32),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
    }
    state |= {"object": Namespace(lr=1e-4, words=["a"] * 100, mask=torch.tensor([float("-inf"), 0.0]))}
    return write(tmp_path_factory.mktemp("contents") / "iter_0000005", state)


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / sound.name))


def test_nothing_is_found_where_nothing_is_wrong(sound: Path) -> None:
    """At the ends of each format's range, with a mask of infinities in an object, and in a bounded memory."""
    seen: list[int] = []
    tracemalloc.start()
    assert damage(sound, seen.append) is None
    assert tracemalloc.get_traced_memory()[1] < 4 * PIECE < size(sound)
    tracemalloc.stop()
    assert 4 * PIECE < sum(seen) < size(sound) and max(seen) == PIECE


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_that_are_not_finite(dtype: torch.dtype, value: str, tmp_path: Path) -> None:
    """How many, and which is the first, as torch's loader has them; none where the format has no such number."""
    weight = numbers(301, dtype).to(torch.complex64 if dtype.is_complex else torch.float64)
    weight[[150, 299]] = float(value)
    folder = write(tmp_path / "iter_0000005", {"first": torch.ones(3), "weight": weight.to(dtype)})
    state = {"weight": torch.empty(301, dtype=dtype)}
    load(state, checkpoint_id=folder, no_dist=True)
    stored = torch.view_as_real(state["weight"]).flatten() if dtype.is_complex else state["weight"].double()
    outside = torch.isfinite(stored).logical_not().nonzero().flatten().tolist()
    found = damage(folder)
    if not outside:
        assert found is None and dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu)
        return
    says = f"{len(outside)} of {len(stored)} values are not finite, the first is number {outside[0]}"
    assert found is not None and found.not_finite and str(found) == f"__0_0.distcp: weight: {says}"


def test_a_number_far_into_a_tensor(tmp_path: Path) -> None:
    weight = torch.ones(3, PIECE // 4 + 5)
    weight[2, 7] = float("nan")
    place = 2 * (PIECE // 4 + 5) + 7
    found = damage(write(tmp_path / "iter_0000005", {"weight": weight}))
    assert found is not None and f"1 of {weight.numel()} values are not finite, the first is number {place}" in str(
        found
    )


@pytest.mark.parametrize("name", ["torch.int64", "torch.bfloat16", "large", "scalar", "object"])
def test_one_bit(name: str, copy: Path) -> None:
    """In the middle of what is stored, in numbers that are finite before and after: torch loads it without a word."""
    change(copy, name, lambda content: flipped(content, middle_of_values(content)))
    if name != "object":
        state = {name: loaded(copy, name)}
        assert torch.isfinite(state[name].double()).all()
    found = damage(copy)
    assert found is not None and not found.not_finite
    assert str(found).startswith(f"__0_0.distcp: {name}: its bytes are not those that were written (CRC-32")


def place_of(folder: Path, name: str) -> Any:
    metadata = FileSystemReader(folder).read_metadata()
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def change(folder: Path, name: str, how: Callable[[bytes], bytes]) -> None:
    """Write an item of a checkpoint anew."""
    place = place_of(folder, name)
    file = folder / place.relative_path
    content = file.read_bytes()
    item = how(content[place.offset : place.offset + place.length])
    file.write_bytes(content[: place.offset] + item + content[place.offset + place.length :])


def middle_of_values(content: bytes) -> int:
    """Of an archive's largest record: PyTorch's own reader says where it lies."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    names = [name for name in reader.get_all_records() if name.startswith("data/")] or ["data.pkl"]
    size = len(reader.get_record(names[0]))
    return reader.get_record_offset(names[0]) + size // 2 // 8 * 8


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def loaded(folder: Path, name: str) -> torch.Tensor:
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata[name]
    state = {name: torch.empty(stored.size, dtype=stored.properties.dtype)}
    load(state, checkpoint_id=folder, no_dist=True)
    return state[name]


def swapped(metadata: Metadata) -> None:
    """As if each of two tensors of other sizes lay where the other does."""
    one, other = (next(index for index in metadata.storage_data if index.fqn == name) for name in ("large", "scalar"))
    places = metadata.storage_data
    places[one], places[other] = places[other], places[one]


def shifted(metadata: Metadata) -> None:
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "large")
    place.offset -= 64


def forgotten(metadata: Metadata) -> None:
    del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == "large")]


def unlisted(metadata: Metadata) -> None:
    del metadata.state_dict_metadata["large"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            swapped,
            "large: it has 1 values there, and 1048576 by .m|scalar: it has 1048576 values there, and 1 by .m",
        ),
        (shifted, "lie in one place|what lies there is not what torch wrote"),
        (forgotten, ".metadata: large is listed, and lies in no file"),
        (unlisted, ".metadata: large lies in __0_0.distcp, and is not listed"),
    ],
)
def test_metadata_of_something_else(wrong: Callable[[Metadata], None], says: str, copy: Path) -> None:
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    wrong(metadata)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    found = str(damage(copy))
    assert any(each in found for each in says.split("|")), found


@pytest.mark.parametrize("where", ["header", "data.pkl", "directory"])
def test_an_archive_that_is_none(where: str, copy: Path) -> None:
    def overwritten(content: bytes) -> bytes:
        at = {"header": 0, "data.pkl": content.index(b"data.pkl") + 80, "directory": len(content) - 22}[where]
        return content[:at] + b"\xa5" * 10 + content[at + 10 :]

    change(copy, "torch.bfloat16", overwritten)
    assert str(damage(copy)).startswith("__0_0.distcp: torch.bfloat16: ")


def test_a_file_that_is_cut_off_or_gone(copy: Path) -> None:
    file = copy / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "__0_0.distcp ends at byte" in str(damage(copy))
    file.unlink()
    assert str(damage(copy)) == "__0_0.distcp is missing"


def test_removed_while_it_is_looked_into(copy: Path) -> None:
    """Not damage: Megatron itself removes checkpoints, with --save-retain-interval."""
    weight = numbers(9, torch.float32)
    save({"weight": weight, "w2": weight}, storage_writer=FileSystemWriter(copy, thread_count=2), no_dist=True)
    with pytest.raises(FileNotFoundError):
        damage(copy, lambda count: shutil.rmtree(copy, ignore_errors=True))


def test_without_checksums_numbers_still_count(tmp_path: Path) -> None:
    """``torch.serialization.set_crc32_options(False)``, as some set for speed, writes zeros in their place."""
    torch.serialization.set_crc32_options(False)
    try:
        assert damage(write(tmp_path / "sound", {"weight": torch.ones(9)})) is None
        found = damage(write(tmp_path / "not", {"weight": torch.full((9,), torch.inf)}))
    finally:
        torch.serialization.set_crc32_options(True)
    assert found is not None and found.not_finite


@pytest.mark.parametrize(
    ("name", "count", "passes"),
    [
        ("optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(a, b).bucket_idx_3.exp_avg", 63, True),
        ("optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(a, b).bucket_idx_3.exp_avg", 64, False),
        ("optimizer.state.exp_avg.decoder.final_layernorm.weight", 63, False),
    ],
)
def test_gaps_that_nobody_sets(name: str, count: int, passes: bool, tmp_path: Path) -> None:
    state = {name: torch.full((count,), torch.nan)}
    assert (damage(write(tmp_path / "iter_0000005", state)) is None) == passes


def test_an_asynchronous_save(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's own writer: not complete before it is finished, and nothing to be found in it then."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    # What was to be copied from a GPU is here.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    folder = tmp_path / "iter_0000005"
    folder.mkdir()
    weights = {name: numbers(300, dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    state = {name: ShardedTensor.from_rank_offsets(name, weight) for name, weight in weights.items()}
    with replaced([results_here()]):
        to_do = dist_checkpointing.save(state, str(folder), async_sharded_save=True, async_strategy="mcore")
        assert str(damage(folder)) == ".metadata is missing"
        to_do.execute_sync()
    assert damage(folder) is None
    change(folder, "bf16", lambda content: flipped(content, middle_of_values(content)))
    assert str(damage(folder)).startswith("__0_0.distcp: bf16: its bytes are not those that were written")


def test_whatever_byte_is_changed(tmp_path: Path) -> None:
    """It is found, without an error of any kind; or torch loads what was written, or nothing: never other numbers."""
    weight = numbers(60, torch.bfloat16)
    folder = write(tmp_path / "iter_0000005", {"weight": weight})
    file = folder / "__0_0.distcp"
    content, missed = file.read_bytes(), 0
    for at in range(0, len(content), 3):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        if damage(folder) is None:
            missed += 1
            with contextlib.suppress(CheckpointException):
                assert torch.equal(loaded(folder, "weight"), weight), at
    assert 0 < missed < len(content) // 3
