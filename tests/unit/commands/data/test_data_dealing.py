"""Text dealt out to tasks: all of it, once, at the borders of documents, about as much to each."""

from __future__ import annotations

import gzip
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sla_megatron.commands.data.dealing import Share, deal
from sla_megatron.commands.data.documents import Document, Fault
from sla_megatron.commands.data.inputs import Inputs
from sla_megatron.commands.data.sources import Source, TextFile


def write(folder: Path, name: str, size: int) -> TextFile:
    """Lines of nine characters and their end."""
    content = b"".join(b"%09d\n" % i for i in range(size // 10))
    (folder / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return TextFile(folder / name, "text")


def read(sources: list[Source], limit: int = 100, block_bytes: int = 20) -> list[tuple[int, str | Fault]]:
    """Every document and fault, with the source that it is of."""
    inputs = Inputs(sources, "text", block_bytes, limit)
    found = [(block.source, document) for block in inputs.blocks() for document in inputs.documents(block)]
    return [(source, each.text if isinstance(each, Document) else each) for source, each in found]


def test_files_are_dealt_by_size(tmp_path: Path) -> None:
    """Checked by hand: 100, 70, 60, 40 and 30 to three tasks, the largest first, each to the one with the least."""
    sources = [write(tmp_path, f"{size}.txt", size) for size in (30, 70, 100, 60, 40)]
    dealt = deal(sources, 3, block_bytes=1000)
    assert [[sources[share.source].name[len(str(tmp_path)) + 1 :] for share in task] for task in dealt] == [
        ["100.txt"],
        ["30.txt", "70.txt"],
        ["60.txt", "40.txt"],
    ]
    assert deal(sources, 3, block_bytes=1000) == dealt


def test_what_is_large_is_cut_where_it_can_be(tmp_path: Path) -> None:
    """To equal shares; a compressed file is read from its beginning alone, and one task takes it."""
    large, small = write(tmp_path, "large.txt", 900), write(tmp_path, "small.txt", 20)
    assert [[(s.source, s.start, s.end) for s in task] for task in deal([large], 3, 100)] == [
        [(0, 0, 300)],
        [(0, 300, 600)],
        [(0, 600, 900)],
    ]
    packed = write(tmp_path, "large.txt.gz", 9000)
    assert deal([packed], 3, 10) == [[Share(0, 0, None, packed.work)]]
    # No piece is smaller than a shard; who gets nothing is no task.
    assert [len(task) for task in deal([large, small], 8, 400)] == [1, 1, 1]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 60), max_size=25),
    end=st.sampled_from([b"\n", b"\r\n"]),
    ended=st.booleans(),
    tasks=st.integers(1, 9),
    limit=st.integers(5, 60),
)
def test_pieces_hold_what_the_file_holds(
    lengths: list[int], end: bytes, ended: bool, tasks: int, limit: int, tmp_path: Path
) -> None:
    """The documents in order, and the same words on each that is too large, wherever the borders are."""
    text = end.join(b"%c" % (97 + i % 26) * length for i, length in enumerate(lengths)) + end * ended
    (tmp_path / "c.txt").write_bytes(text)
    source = TextFile(tmp_path / "c.txt", "text")
    shares = sorted((share for task in deal([source], tasks, 1) for share in task), key=lambda share: share.start)
    found = [document for share in shares for _, document in read([share.of(source)], limit)]
    expected = []
    for i, length in enumerate(lengths):
        # The lines of shards are counted together later, as those of a whole file are.
        if length > limit:
            expected.append(("too-large", f"{length} bytes"))
        elif length:
            expected.append(chr(97 + i % 26) * length)
    assert [(each.kind, each.detail) if isinstance(each, Fault) else each for each in found] == expected
    assert sum(share.work for share in shares) == len(text)
