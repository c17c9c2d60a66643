"""One block's result on disk: documents in Megatron's indexed format, faults, and a record that says it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy

from ...common.files import flush, write_json
from .blocks import Block
from .documents import Fault, count_lines
from .encoding import Encoder
from .index_format import write_index
from .inputs import Inputs

# Two numbers of 64 bits.
_DIGEST_BYTES = 16
# How often is said how far a block is.
_ADVANCE_SECONDS = 0.5


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard.

    ``start``, ``end``, ``last`` and ``work`` are its block's; ``lines`` counts its lines or rows, ``blank_lines`` those
    of white space alone; ``text_bytes`` the UTF-8 of its documents; ``faults`` documents left out, by kind.
    """

    number: int
    source: int
    start: int
    end: int
    last: bool
    work: float
    lines: int
    blank_lines: int
    documents: int
    tokens: int
    text_bytes: int
    faults: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """A finished shard, and the folder that its files are in."""

    folder: Path
    record: ShardRecord


@dataclass(frozen=True, slots=True)
class Advance:
    """How far a worker is within the block ``number``: ``share`` of it (0 to 1), ``documents``, ``tokens``."""

    number: int
    share: float
    documents: int
    tokens: int


class FatalFault(Exception):
    """The first fault of a block, where faults end the job; ``number`` is the block's."""

    def __init__(self, number: int, source: int, fault: Fault) -> None:
        super().__init__(number, source, fault)
        self.number, self.source, self.fault = number, source, fault


class ShardWriter:
    """Turns blocks into shards in ``folder``.

    Args:
        folder: where shards are.
        inputs: to read documents with.
        encoder: to encode them with.
        digests: whether to keep each document's hash, for a split or against duplicates.
        fatal: whether the first fault raises :class:`FatalFault`.
    """

    def __init__(self, folder: Path, inputs: Inputs, encoder: Encoder, digests: bool, fatal: bool) -> None:
        self.folder, self.inputs, self.encoder, self.digests, self.fatal = folder, inputs, encoder, digests, fatal

    @property
    def vocab_size(self) -> int:
        """Of the encoder."""
        return self.encoder.vocab_size

    def write(self, block: Block, advanced: Callable[[Advance], None]) -> ShardRecord:
        """Encode ``block``, and have all of it on disk before its record appears.

        ``advanced`` is called about twice a second meanwhile.
        """
        prefix = shard_prefix(self.folder, block.number)
        # A worker of a killed run may still be at the same shard.
        unfinished = prefix.with_name(f"{prefix.name}.{os.getpid()}")
        paths = {suffix: Path(f"{unfinished}{suffix}") for suffix in (".bin", ".idx", ".digests", ".faults")}
        try:
            with paths[".bin"].open("wb") as tokens:
                lengths, counts, digests, faults = self._encode(block, tokens, advanced)
            write_index(paths[".idx"], self.encoder.dtype, lengths)
            paths[".digests"].write_bytes(digests)
            paths[".faults"].write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in faults))
            record = self._record(block, counts, faults)
            for suffix, path in paths.items():
                flush(path)
                path.rename(f"{prefix}{suffix}")
        finally:
            for path in paths.values():
                path.unlink(missing_ok=True)
        write_json(Path(f"{prefix}.json"), asdict(record))
        return record

    def _encode(
        self, block: Block, file: BinaryIO, advanced: Callable[[Advance], None]
    ) -> tuple[list[int], dict[str, int], bytearray, list[Fault]]:
        lengths, digests, faults = [], bytearray(), []
        tokens = text_bytes = 0
        said = time.monotonic()
        for document in self.inputs.documents(block):
            if not isinstance(document, Fault):
                try:
                    ids = self.encoder(document.text)
                except Exception as error:  # Libraries in C++ and Rust raise what they like.
                    document = Fault(document.line, "tokenizer", str(error)[:200])
            if isinstance(document, Fault):
                if self.fatal:
                    raise FatalFault(block.number, block.source, document)
                faults.append(document)
                continue
            file.write(ids.tobytes())
            lengths.append(len(ids))
            tokens += len(ids)
            text_bytes += len(document.encoded)
            if self.digests:
                digests += hashlib.blake2b(document.encoded, digest_size=_DIGEST_BYTES).digest()
            if (now := time.monotonic()) - said >= _ADVANCE_SECONDS:
                said = now
                # What is around the texts, as in JSON lines, is taken to be evenly spread.
                share = min(text_bytes / max(len(block.payload or b""), 1), 1.0)
                advanced(Advance(block.number, share, len(lengths), tokens))
        counts = {"documents": len(lengths), "tokens": tokens, "text_bytes": text_bytes}
        return lengths, counts, digests, faults

    def _record(self, block: Block, counts: dict[str, int], faults: list[Fault]) -> ShardRecord:
        kind = self.inputs.sources[block.source].kind
        lines, blank = (1, 0) if block.payload is None else count_lines(block.payload, kind)
        return ShardRecord(
            number=block.number,
            source=block.source,
            start=block.start,
            end=block.end,
            last=block.last,
            work=block.work,
            lines=lines,
            blank_lines=blank,
            **counts,
            faults=dict(Counter(fault.kind for fault in faults)),
        )


def shard_prefix(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}"


def read_records(folder: Path) -> dict[int, ShardRecord]:
    """The finished shards in ``folder`` by number."""
    records = (ShardRecord(**json.loads(path.read_text())) for path in sorted(folder.glob("[0-9]*.json")))
    return {record.number: record for record in records}


def read_faults(folder: Path, number: int) -> list[Fault]:
    lines = Path(f"{shard_prefix(folder, number)}.faults").read_text().splitlines()
    return [Fault(**json.loads(line)) for line in lines]


def read_digests(folder: Path, number: int) -> numpy.ndarray:
    """The documents' hashes as two 64-bit numbers each, ``[documents, 2]``."""
    return numpy.fromfile(f"{shard_prefix(folder, number)}.digests", dtype="<u8").reshape(-1, 2)
