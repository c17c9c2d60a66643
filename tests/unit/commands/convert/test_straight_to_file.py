"""What a conversion does not do: import what it does not need, copy what lies in a file, keep silent.

The checkpoint is one that an earlier commit wrote, and the export which that commit made of it.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from sla_megatron.commands.convert import checkpoint_arguments, cli, megatron_reader, progress
from sla_megatron.commands.convert.assemble import Assembler
from sla_megatron.commands.convert.checkpoint_arguments import Member
from sla_megatron.commands.convert.commands import megatron_to_hf, open_megatron
from sla_megatron.commands.convert.errors import ConvertError
from sla_megatron.commands.convert.hf_reader import HFSource
from sla_megatron.commands.convert.mapping import QUERY, VOCABULARY, entries
from sla_megatron.commands.convert.prune import Pruned
from sla_megatron.commands.convert.stored_items import UnfamiliarError
from sla_megatron.commands.convert.tokenizer import vocabulary_size
from sla_megatron.common.tokenizers import DEFAULTS, build, token_count
from tests.support.launch import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")

WRITTEN = ROOT / "tests" / "data" / "e565a8e"
CHECKPOINT, EXPORT = WRITTEN / "checkpoint" / "full", WRITTEN / "export" / "full"
STEP = CHECKPOINT / "iter_0000003"

_CHILD = """
import json, sys
from sla_megatron.commands.convert import cli

class Watched:
    first = None
    def write(self, text):
        if Watched.first is None:
            Watched.first = [text, "torch" in sys.modules]
        return sys.__stderr__.write(text)
    def flush(self): sys.__stderr__.flush()
    def isatty(self): return False

sys.stderr, sys.argv = Watched(), ["sla-convert", "megatron-to-hf", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
print(json.dumps([Watched.first, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def test_an_export_imports_neither_megatron_nor_transformers(tmp_path: Path) -> None:
    """Of a model whose tokenizer is none; and before torch is imported, it says what it reads."""
    command = [sys.executable, "-c", _CHILD, str(CHECKPOINT), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=200)
    first, imported = json.loads(done.stdout.splitlines()[-1])
    assert first == [f"reading {CHECKPOINT}", False]
    assert {"torch", "safetensors"} <= set(imported)
    assert not {"megatron", "transformers", "tokenizers", "triton", "transformer_engine", "wandb"} & set(imported)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (EXPORT / "model.safetensors").read_bytes()


def test_arguments_are_those_that_megatron_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected: Megatron's own loading, with its parser's defaults."""
    expected = vars(checkpoint_arguments.stored_args(STEP))
    monkeypatch.setattr(checkpoint_arguments, "stored_args", lambda _: pytest.fail("Megatron was asked"))
    found = checkpoint_arguments.export_args(STEP)
    assert any(isinstance(value, Member) for value in vars(found).values())
    assert vars(checkpoint_arguments.whole(found)) == expected


def test_what_is_not_known_without_megatron_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types beyond those of today's checkpoints; arguments of a version that had fewer."""
    asked = Namespace(asked=True)
    monkeypatch.setattr(checkpoint_arguments, "stored_args", lambda _: asked)
    given = checkpoint_arguments._without_megatron(STEP)
    for change in ("a mapped argument less", "unknown types"):
        if change == "unknown types":
            monkeypatch.setattr(checkpoint_arguments, "_without_megatron", raising)
        else:
            del given.rotary_percent
            monkeypatch.setattr(checkpoint_arguments, "_without_megatron", lambda _: given)
        assert checkpoint_arguments.export_args(STEP) is asked


def test_arguments_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As older versions of Megatron store them, in place of those in the shards; expected: what went into it."""
    args = checkpoint_arguments.stored_args(STEP)
    shutil.copytree(STEP, tmp_path / "step")
    args.num_layers = -1
    torch.save({"args": args, "iteration": 3}, tmp_path / "step" / "common.pt")
    monkeypatch.setattr(checkpoint_arguments, "stored_args", lambda _: pytest.fail("Megatron was asked"))
    found = checkpoint_arguments.export_args(tmp_path / "step")
    assert found.num_layers == -1 and vars(checkpoint_arguments.whole(found)) == vars(args)


def raising(*_: Any) -> Any:
    raise UnfamiliarError("as if")


@pytest.mark.parametrize("size", [1, 121, 50257])
def test_a_null_tokenizer_has_as_many_tokens_as_megatron_s(size: int) -> None:
    settings = Namespace(**DEFAULTS | {"tokenizer_type": "NullTokenizer", "vocab_size": size})
    assert vocabulary_size(settings) == token_count(build(settings))


def test_what_torch_reads_in_place_of_us_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_reader, "read_tensor", raising)
    megatron_to_hf(open_megatron(CHECKPOINT), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (EXPORT / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "cuts", [((0, 8), (0, 6)), ((0, 2, 5, 8), (0, 6)), ((0, 8), (0, 3, 6)), ((0, 5, 8), (0, 1, 6))]
)
def test_rows_of_shards(cuts: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Whole, of rows, of columns, of both: any rows are those of the whole; views where columns are not cut."""
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    rows, columns = ([slice(*ends) for ends in pairwise(cut)] for cut in cuts)
    shards = [((row.start, column.start), whole[row, column]) for row in rows for column in columns]
    source, place = object.__new__(megatron_reader.MegatronSource), ("key", None)
    source.path, source._kept = Path("x"), {place: shards}
    source._stored = {"key": SimpleNamespace(size=whole.shape, properties=SimpleNamespace(dtype=whole.dtype))}
    for start, length in ((0, 8), (1, 3), (2, 3), (4, 4), (6, 1), (3, 0)):
        found = source._rows(place, start, length)
        assert torch.equal(torch.cat([torch.empty(0, 6), *found]), whole[start : start + length])
        of_whole = [part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in found]
        assert all(of_whole) or len(columns) > 1
    source._kept = {place: [*shards, shards[0]]}
    with pytest.raises(ConvertError, match="the shards of key overlap"):
        source._rows(place, 0, 8)


class Copied(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(args)}
        made = [tensor for tensor in tensors_in([result]) if tensor.untyped_storage().data_ptr() not in given]
        self.bytes += sum(tensor.untyped_storage().nbytes() for tensor in made)
        return result


def tensors_in(values: Sequence[Any]) -> list[torch.Tensor]:
    found = [each for each in values if isinstance(each, torch.Tensor)]
    return found + [each for value in values if isinstance(value, list | tuple) for each in tensors_in(value)]


def test_what_is_stored_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values together; the vocabulary a second time, for its padding."""
    opened: Counter[tuple[Path, int]] = Counter()
    original = megatron_reader.read_tensor

    def counting(path: Path, offset: int, length: int) -> torch.Tensor:
        opened[path, offset] += 1
        return original(path, offset, length)

    monkeypatch.setattr(megatron_reader, "read_tensor", counting)
    megatron_to_hf(source := open_megatron(CHECKPOINT), tmp_path / "out")
    stored = {(entry.megatron, entry.layer) for entry in entries(source.config)}
    assert sorted(opened.values()) == [*[1] * (len(stored) - 1), 2]


class InOnePiece:
    """A source that puts each tensor's rows together before they are written."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def parts(self, name: str) -> list[torch.Tensor]:
        return [self.source.get(name)]


def test_an_export_copies_nothing_but_the_padding(tmp_path: Path) -> None:
    """A source that joins the rows of a tensor is found out."""
    weights = sum(tensor.nbytes for tensor in load_file(EXPORT / "model.safetensors").values())
    padding = sum(tensor.nbytes for tensor in load_file(EXPORT / "megatron_padding.safetensors").values())
    found = {}
    for kind in (lambda source: source, InOnePiece):
        with Copied() as copied:
            megatron_to_hf(kind(open_megatron(CHECKPOINT)), tmp_path / str(kind))
        found[kind] = copied.bytes
    assert list(found.values())[0] == padding
    assert found[InOnePiece] == padding + weights


def test_the_way_back_copies_the_mixed_and_the_padded_tensors_alone() -> None:
    source = HFSource(EXPORT)
    assembler = Assembler(source, 128, Namespace())
    mixed = padded = 0
    with Copied() as copied:
        for key, layer in {(entry.megatron, entry.layer) for entry in entries(source.config)}:
            parts = [entry for entry in entries(source.config) if (entry.megatron, entry.layer) == (key, layer)]
            rows, kinds = sum(entry.shape[0] for entry in parts), {entry.part for entry in parts}
            size = 4 * sum(torch.Size(entry.shape).numel() for entry in parts)
            mixed += size if QUERY in kinds else 0
            padded += size * 128 // rows if VOCABULARY in kinds else 0
            assembler.tensor(key, layer, 0, 128 if VOCABULARY in kinds else rows)
    # The rows of padding are read once more, from a file of their own.
    assert mixed + padded <= copied.bytes <= mixed + padded + 4 * 16 * (128 - source.config["vocab_size"])


def test_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Beside a terminal, in every command: how much is written, and of how much."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.001)
    for command, source in (("megatron-to-hf", CHECKPOINT), ("prune", EXPORT)):
        out = tmp_path / command
        monkeypatch.setattr(sys, "argv", ["sla-convert", command, str(source), str(out)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        lines = capsys.readouterr().err.splitlines()
        assert (ended.value.code, lines[0]) == (0, f"reading {source}")
        assert len(lines) > 1
        for line in lines[1:]:
            assert re.fullmatch(rf"writing {out}: \d+%, [\d.]+k? of [\d.]+k, \S+, \S+ left", line), line


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.progress(Path("out"), tmp_path, 1 << 20):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "weights").write_bytes(bytes(1 << 20))
    assert re.search(r"\rwriting out: 100%\|[█#]+\| 1\.00M/1\.00M", terminal.getvalue())


def test_a_pruned_export_has_the_live_rows(tmp_path: Path) -> None:
    """Straight from a checkpoint, and of its export: the same."""
    for name, source in (("checkpoint", open_megatron(CHECKPOINT)), ("export", HFSource(EXPORT))):
        megatron_to_hf(Pruned(source), tmp_path / name) if name == "checkpoint" else None
        found = {entry.hf: Pruned(source).get(entry.hf) for entry in entries(Pruned(source).config)}
        written = load_file(tmp_path / "checkpoint" / "model.safetensors")
        assert written.keys() == found.keys()
        assert all(torch.equal(written[each], found[each]) for each in found)
