"""What is in a checkpoint, beside how long its files are: bytes as they were written, and numbers that are finite.

torch writes each tensor, and each object, as an archive of its own, whose records have a CRC-32 each
(``torch.serialization.get_crc32_options``, on by default); its loader does not compare it.  Read here in pieces, by one
core, without torch; numpy is imported by the first look.

What is let pass: what is not finite in objects, of which the checksums alone are looked at (arguments, random states,
the scales and past maxima of Transformer Engine); and in the gaps between parameters, which nobody sets, in optimizer
buffers that are saved as they lie in memory.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .checkpoint_folders import StandIns, problem

if TYPE_CHECKING:
    import numpy as np

#: How many bytes are looked at together: the cache of a core holds them.
PIECE = 1 << 20

#: torch's name of a storage or dtype -> bytes a value, the bits beside its sign, and the least of these that is not
#: finite: the exponent's bits all set; where a format has no infinity, its one NaN.
_FORMATS = {
    "DoubleStorage": (8, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "ComplexDoubleStorage": (8, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "FloatStorage": (4, 0x7FFFFFFF, 0x7F800000),
    "ComplexFloatStorage": (4, 0x7FFFFFFF, 0x7F800000),
    "HalfStorage": (2, 0x7FFF, 0x7C00),
    "BFloat16Storage": (2, 0x7FFF, 0x7F80),
    "float8_e5m2": (1, 0x7F, 0x7C),
    "float8_e4m3fn": (1, 0x7F, 0x7F),
    "float8_e8m0fnu": (1, 0xFF, 0xFF),
}

#: Of a record in an archive, in the way of DOS.
_FOLDER = 0x10

_OTHER_BYTES = "its bytes are not those that were written (CRC-32)"

#: In Megatron's distributed optimizer parameters begin at multiples of this (``pad_param_start`` in
#: megatron/core/optimizer/param_layout.py); what is between them is memory that was never set
#: (``sharded_param_state_dp_reshardable`` in distrib_optimizer.py), and a shard of its own, shorter than this.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Damage:
    """What is wrong with a checkpoint; ``not_finite``: it was written so."""

    text: str
    not_finite: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Item:
    """A shard of a tensor, or an object: what the metadata says of it."""

    name: str
    file: str
    start: int
    length: int
    #: Values of the tensor's shard; None for an object.
    values: int | None
    #: Whether torch was asked to put it through something on the way to the file.
    transformed: bool

    @property
    def may_be_unset(self) -> bool:
        return ".bucket_idx_" in self.name and self.values is not None and self.values < _ALIGNMENT


def damage(folder: Path, pulse: Callable[[int], None] = lambda count: None) -> Damage | None:
    """What is wrong with the contents of a checkpoint; None if nothing is found.

    Args:
        folder: one ``iter_*``.
        pulse: called with the bytes of each piece that was looked at; what it raises ends the look.

    Raises:
        FileNotFoundError: if it is removed meanwhile.
    """
    if (reason := problem(folder)) is not None:
        return Damage(reason)
    try:
        items = _items(folder)
    except _Disagreement as error:
        return Damage(f".metadata: {error}")
    except Exception as error:  # A pickle of other bytes raises what it likes.
        return Damage(f".metadata cannot be read ({type(error).__name__})")
    for name, inside in items.items():
        with (folder / name).open("rb", buffering=0) as file:
            for item in inside:
                found = None if item.transformed else _look(file, item, pulse)
                if found is not None:
                    return Damage(f"{name}: {item.name}: {found}", found.not_finite)
    return None


def size(folder: Path) -> int:
    """Bytes of the files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


class _Disagreement(Exception):
    """Parts of the metadata that do not belong together."""


def _items(folder: Path) -> dict[str, list[_Item]]:
    """By file, in their order there."""
    with (folder / ".metadata").open("rb") as file:
        metadata = StandIns(file).load()
    shards: dict[tuple[str, Any], int | None] = {}
    for name, stored in metadata.state_dict_metadata.items():
        for chunk in getattr(stored, "chunks", ()):
            shards[name, _numbers(chunk.offsets)] = math.prod(_numbers(chunk.sizes))
        if not hasattr(stored, "chunks"):
            shards[name, None] = None
    items = defaultdict(list)
    for index, place in metadata.storage_data.items():
        offset = getattr(index, "offset", None)
        offset = None if offset is None else _numbers(offset)
        key = (index.fqn, offset) if (index.fqn, offset) in shards else (index.fqn, None)
        if key not in shards:
            raise _Disagreement(f"{index.fqn} lies in {place.relative_path}, and is not listed")
        values = shards.pop(key)
        shown = index.fqn + (f" at {list(offset)}" if offset is not None and any(offset) else "")
        transformed = bool(getattr(place, "transform_descriptors", None))
        item = _Item(shown, place.relative_path, place.offset, place.length, values, transformed)
        items[place.relative_path].append(item)
    if shards:
        raise _Disagreement(f"{next(iter(shards))[0]} is listed, and lies in no file")
    for inside in items.values():
        inside.sort(key=lambda item: item.start)
        for before, after in zip(inside, inside[1:], strict=False):
            if before.start + before.length > after.start:
                raise _Disagreement(f"{before.name} and {after.name} lie in one place")
    return dict(sorted(items.items()))


def _numbers(size: Any) -> tuple[int, ...]:
    """Those of a ``torch.Size``, or of what stands in for one."""
    return tuple(getattr(size, "arguments", (size,))[0])


@dataclass(frozen=True)
class _Record:
    """Of an archive: bytes that have a checksum.  ``form`` is that of the numbers which they are, and None else."""

    start: int
    length: int
    checksum: int
    form: str | None


def _look(file: BinaryIO, item: _Item, pulse: Callable[[int], None]) -> Damage | None:
    try:
        records = _records(file, item)
    except _Disagreement as error:
        return Damage(str(error))
    except OSError as error:
        return Damage(f"cannot be read ({error.strerror})")
    except Exception as error:  # Other bytes raise what they like.
        return Damage(f"what lies there is not what torch wrote ({error or type(error).__name__})")
    return next((found for record in records if (found := _look_at_record(file, record, pulse)) is not None), None)


def _records(file: BinaryIO, item: _Item) -> list[_Record]:
    """Those of an archive that torch wrote; raises anything where there is another, or none."""
    archive = zipfile.ZipFile(_Window(file, item.start, item.length))
    listed = {record.filename.partition("/")[2]: record for record in archive.infolist()}
    pickled = listed["data.pkl"]
    archive.fp.seek(_data(archive, pickled))
    content = archive.fp.read(pickled.file_size)
    if pickled.CRC and zlib.crc32(content) != pickled.CRC:
        raise _Disagreement(_OTHER_BYTES)
    form, values = _pickled(content)
    if item.values is not None and values not in (None, item.values):
        raise _Disagreement(f"it has {values} values there, and {item.values} by .metadata")
    if item.values is None or item.may_be_unset:
        form = None
    records = []
    for name, record in listed.items():
        start = _data(archive, record)
        if start + record.file_size > item.length or record.compress_type != zipfile.ZIP_STORED:
            raise _Disagreement(f"{name} does not lie within it")
        # torch's loader then gives other numbers without a word.
        if record.external_attr & _FOLDER:
            raise _Disagreement(f"{name} is called a folder")
        own = form if name.startswith("data/") else None
        if own is not None and record.file_size % _FORMATS[own][0]:
            raise _Disagreement(f"{name} ends within a number")
        records.append(_Record(item.start + start, record.file_size, record.CRC, own))
    return records


def _data(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    """Where in the archive the bytes of a record begin."""
    stream = archive.fp
    stream.seek(record.header_offset)
    header = struct.unpack(zipfile.structFileHeader, stream.read(zipfile.sizeFileHeader))
    if header[0] != zipfile.stringFileHeader:
        raise zipfile.BadZipFile(f"no record at byte {record.header_offset}")
    if stream.read(header[-2]) != record.orig_filename.encode():
        raise zipfile.BadZipFile(f"another record than {record.filename}")
    return record.header_offset + zipfile.sizeFileHeader + header[-2] + header[-1]


def _look_at_record(file: BinaryIO, record: _Record, pulse: Callable[[int], None]) -> Damage | None:
    checksum, seen, bad, first = 0, 0, 0, 0
    pieces = _pieces(file, record.start, record.length)
    while True:
        # Not around what pulse raises.
        try:
            piece = next(pieces, None)
        except OSError as error:
            return Damage(f"cannot be read ({error.strerror})")
        if piece is None:
            break
        # 0: torch was told to write none.
        if record.checksum:
            checksum = zlib.crc32(piece, checksum)
        if record.form is not None:
            outside = _not_finite(piece, record.form)
            if outside is not None and not bad:
                first = seen + int(outside.argmax())
            bad += 0 if outside is None else int(outside.sum())
            seen += len(piece) // _FORMATS[record.form][0]
        pulse(len(piece))
    if record.checksum and checksum != record.checksum:
        return Damage(_OTHER_BYTES)
    if bad:
        return Damage(f"{bad} of {seen} values are not finite, the first is number {first}", not_finite=True)
    return None


def _pieces(file: BinaryIO, start: int, length: int) -> Iterator[memoryview]:
    file.seek(start)
    buffer = memoryview(bytearray(min(PIECE, length)))
    while length:
        # A read may be short in the middle of a value.
        filled = 0
        while filled < min(PIECE, length):
            count = file.readinto(buffer[filled : min(PIECE, length)])
            if not count:
                raise OSError(0, "the file ends before it")
            filled += count
        length -= filled
        yield buffer[:filled]


def _not_finite(piece: memoryview, form: str) -> np.ndarray | None:
    """Which values are not finite; None if none is."""
    import numpy as np

    width, beside_sign, least = _FORMATS[form]
    bits = np.frombuffer(piece, dtype=f"u{width}")
    bits = bits & bits.dtype.type(beside_sign)
    return None if bits.max() < least else bits >= least


def _pickled(content: bytes) -> tuple[str | None, int | None]:
    """Of a pickled tensor, which of the formats its values have, and how many there are; None where it has none."""
    pickled = _Pickled(io.BytesIO(content))
    # Of torch._utils._rebuild_tensor_v2 and v3: storage, offset, shape, and more.
    shape = getattr(pickled.load(), "arguments", ())[2:3]
    return pickled.form, math.prod(shape[0]) if shape and isinstance(shape[0], tuple) else None


class _Pickled(StandIns):
    form: str | None = None

    def find_class(self, module: str, name: str) -> Any:
        if name in _FORMATS:
            self.form = name
        return super().find_class(module, name)


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count
