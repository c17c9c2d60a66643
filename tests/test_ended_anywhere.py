"""A command that is ended at any change of the file system is given again and does its work, to the same files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sla_megatron.commands.convert.output import finished_folder
from sla_megatron.commands.data.cli import main
from tests.support.tokenizers import train_sentencepiece

#: What Python says before it changes the file system (``sys.addaudithook``).
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime"}


class EndedError(BaseException):
    """Stands for a process's end: no handler of errors sees it."""


class _Changes:
    """Counts changes below a folder, and lets none happen any more from ``last`` on."""

    def __init__(self) -> None:
        self.below, self.count, self.last = "", 0, None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.last is None or not (event in CHANGES or (event == "open" and _writes(arguments[2]))):
            return
        if str(arguments[0]).startswith(self.below):
            self.count += 1
            if self.count > self.last:
                raise EndedError

    @contextlib.contextmanager
    def allowed(self, folder: Path, count: int) -> Iterator[None]:
        self.below, self.count, self.last = str(folder), 0, count
        try:
            yield
        finally:
            self.last = None


def _writes(flags: Any) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


@pytest.fixture(scope="module")
def changes() -> _Changes:
    return _Changes()


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ended_everywhere(changes: _Changes, folder: Path, before: Path, command: Callable[[], None], step: int = 1) -> int:
    """``command`` works on a copy of ``before`` in ``folder``, ended after 0, 1, 2, ... changes, and is given again."""

    def afresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    afresh()
    command()
    undisturbed = tree(folder)
    for count in itertools.count(step=step):
        afresh()
        with changes.allowed(folder, count):
            try:
                command()
            except EndedError:
                pass
            else:
                return count
        command()
        left = tree(folder)
        # A converter that is killed leaves a folder beside its output, with a name of its own.
        assert undisturbed == {name: left[name] for name in left if not name.startswith(".")}, count


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with a fault, another one, a tokenizer, and a data set of each."""
    folder = tmp_path_factory.mktemp("corpus")
    train_sentencepiece(folder / "t.model", eos_id=2, pad_id=3)
    lines = [json.dumps({"text": f"line {number} of a corpus"}) for number in range(8)]
    (folder / "a.jsonl").write_text("\n".join([*lines[:6], '{"text": ""}', *lines[6:]]) + "\n")
    (folder / "b.jsonl").write_text("\n".join(lines[:3]) + "\n")
    for name in "ab":
        said(tokenize(folder, name))
    return folder


def tokenize(folder: Path, name: str, out: str | None = None, *more: str) -> list[str]:
    given = ["tokenize", "--input", str(folder / f"{name}.jsonl"), "--output-prefix", str(folder / (out or name))]
    given += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "t.model")]
    return [*given, "--on-error", "skip", "--shard-mb", "0.0002", *more]


def said(arguments: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(arguments)
        except SystemExit:
            raise AssertionError(err.getvalue()) from None


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(lambda folder: tokenize(folder, "a", "new"), id="tokenize"),
        pytest.param(lambda folder: tokenize(folder, "a", "new", "--split", "1,1"), id="splits"),
        pytest.param(lambda folder: tokenize(folder, "b", "a", "--overwrite"), id="overwrite"),
        pytest.param(lambda folder: submit(folder, "b", "a", "--overwrite"), id="submit-overwrite"),
        pytest.param(lambda folder: merge(folder, "new"), id="merge"),
        pytest.param(lambda folder: merge(folder, "old", "--overwrite"), id="merge-overwrite"),
    ],
)
def test_data(changes: _Changes, corpus: Path, tmp_path: Path, command: Callable[[Path], list[str]]) -> None:
    folder, before = tmp_path / "work", tmp_path / "before"
    shutil.copytree(corpus, before)
    if "old" in str(command(folder)):
        said(merge(before, "old"))
    # The manifest names its inputs, which lie in the copy.  Most of what submit does is what tokenize does.
    step = 3 if command(folder)[0] == "submit" else 1
    assert ended_everywhere(changes, folder, before, lambda: said(command(folder)), step) > 10


def submit(folder: Path, name: str, out: str, *more: str) -> list[str]:
    return ["submit", "--tasks", "2", "--local", *tokenize(folder, name, out, *more)[1:]]


def merge(folder: Path, out: str, *more: str) -> list[str]:
    return ["merge", *(str(folder / name) for name in "ab"), "--output-prefix", str(folder / out), *more]


@pytest.mark.parametrize("there", [False, True])
def test_a_converted_folder(changes: _Changes, tmp_path: Path, there: bool) -> None:
    def write(out: Path, content: str) -> None:
        with finished_folder(out, overwrite=True) as unfinished:
            for name in ("config.json", "model.safetensors"):
                (unfinished / name).write_text(content)

    before, folder = tmp_path / "before", tmp_path / "work"
    before.mkdir()
    if there:
        write(before / "out", "old")
    assert ended_everywhere(changes, folder, before, lambda: write(folder / "out", "new")) > 4
