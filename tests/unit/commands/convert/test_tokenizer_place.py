"""Where a checkpoint's tokenizer is found: what it holds itself, then what its arguments mean, then beside it."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sla_megatron.commands.convert.tokenizer import carry_tokenizer
from sla_megatron.commands.convert.tokenizer_place import placed
from sla_megatron.common import tokenizers
from tests.support.tokenizers import gpt2_files, hugging_face_folder, tiktoken_file, train_sentencepiece

STEP = "run/out/ck/iter_0000003"
MODEL = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "tok/a.model"}
GPT2 = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "tok/v.json", "merge_file": "tok/m.txt"}
HUB = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "owner/name"}

#: The checkpoint's arguments, files that are there (in the order of preference: the first is what has to be found),
#: and how many of them belong to it.
FOUND: dict[str, tuple[dict[str, Any], list[str]]] = {
    "in the checkpoint": (MODEL, [f"{STEP}/tokenizer/tokenizer.model", "cwd/tok/a.model"]),
    "in the checkpoint, though the path is there": (
        MODEL | {"tokenizer_model": "{}/cwd/tok/a.model"},
        [f"{STEP}/tokenizer/tokenizer.model", "cwd/tok/a.model"],
    ),
    "where it was": (MODEL | {"tokenizer_model": "{}/other/a.model"}, ["other/a.model", "run/out/ck/a.model"]),
    "where training ran": (MODEL | {"save": "out/ck"}, ["run/tok/a.model", "cwd/tok/a.model", "run/out/tok/a.model"]),
    "where training ran, ./": (MODEL | {"save": "./out/ck/"}, ["run/tok/a.model", "cwd/tok/a.model"]),
    "in the folder of saves": (MODEL, ["run/out/ck/tok/a.model", "cwd/tok/a.model", "run/out/tok/a.model"]),
    "where the command runs": (MODEL | {"save": "/scratch/ck"}, ["cwd/tok/a.model", "run/out/tok/a.model"]),
    "a folder up": (MODEL, ["run/out/tok/a.model", "run/tok/a.model"]),
    "two folders up": (MODEL, ["run/tok/a.model", "run/out/ck/a.model"]),
    "beside, by its name": (MODEL, ["run/out/ck/a.model"]),
    "beside, of a path that is gone": (MODEL | {"tokenizer_model": "/gone/a.model"}, ["run/out/ck/a.model"]),
    "beside, in the step": (MODEL | {"tokenizer_model": "/gone/a.model"}, [f"{STEP}/a.model", "run/out/ck/a.model"]),
    "tiktoken, in the checkpoint": (
        MODEL | {"tokenizer_type": "TikTokenizer"},
        [f"{STEP}/tokenizer/tokenizer.json", "cwd/tok/a.model"],
    ),
    "of no use in the checkpoint": (MODEL, ["cwd/tok/a.model", f"{STEP}/tokenizer/tokenizer.json"]),
    "Hugging Face, in the checkpoint": (
        HUB,
        [f"{STEP}/tokenizer/tokenizer_config.json", "cwd/owner/name/vocab.json"],
    ),
    "Hugging Face, broken off": (HUB, ["cwd/owner/name/vocab.json", f"{STEP}/tokenizer/special_tokens_map.json"]),
    "Hugging Face, a folder up": (HUB, ["run/out/owner/name/tokenizer.json", "cwd/owner/name/notes"]),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, files = FOUND[name]
    given = {key: value.format(tmp_path) for key, value in given.items()}
    for file in [*files, "cwd/x", f"{STEP}/.metadata"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path / "cwd")
    # Any spelling of the checkpoint's own path.
    args, tried = placed(Namespace(**given), Path("..", STEP))
    expected = tmp_path / files[0]
    is_folder = given["tokenizer_type"] == "HuggingFaceTokenizer"
    assert Path(args.tokenizer_model) == (expected.parent if is_folder else expected)
    assert tried == []


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([f"{STEP}/tokenizer/vocab.json", f"{STEP}/tokenizer/merges.txt"], f"{STEP}/tokenizer"),
        ([f"{STEP}/tokenizer/vocab.json", "run/tok/v.json", "run/tok/m.txt"], "run/tok"),
        # Two halves of different tokenizers are none.
        (["run/tok/v.json", "run/out/tok/v.json", "run/out/tok/m.txt"], "run/out/tok"),
    ],
)
def test_two_files_are_found_together(
    files: list[str], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    args, _ = placed(Namespace(**GPT2, save="out/ck"), tmp_path / STEP)
    assert {Path(args.vocab_file).parent, Path(args.merge_file).parent} == {tmp_path / found}


def test_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments stay as they are: what is nowhere may be a name on the Hub."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    args, tried = placed(Namespace(**MODEL, save="out/ck"), tmp_path / STEP)
    assert args.tokenizer_model == "tok/a.model"
    places = ["tokenizer/tokenizer.model", "tok/a.model", "../tok/a.model", "a.model", "../a.model"]
    for place in (*(f"{STEP}/{place}" for place in places), "run/tok/a.model", "cwd/tok/a.model"):
        assert str((tmp_path / place).resolve()) in tried


@pytest.mark.parametrize("given", [{"tokenizer_type": "NullTokenizer"}, {"tokenizer_type": "GPT2BPETokenizer"}, {}])
def test_nothing_to_look_for(given: dict[str, Any], tmp_path: Path) -> None:
    args, _ = placed(Namespace(**given), tmp_path / STEP)
    assert vars(args) == given


# What is put into a checkpoint is found there.

KINDS: dict[str, Callable[[Path], Namespace]] = {
    "sentencepiece": lambda folder: Namespace(
        tokenizer_type="GPTSentencePieceTokenizer",
        tokenizer_model=str(train_sentencepiece(folder / "a.model", model_type="unigram")),
    ),
    "tiktoken": lambda folder: tiktoken_file(folder / "vocab.json", special=20),
    "Hugging Face": lambda folder: Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(hugging_face_folder(folder / "in")),
        special_tokens=["<|turn|>"],
    ),
    "GPT-2": lambda folder: gpt2_files(folder),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_carried_is_found(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, megatron_imported: None
) -> None:
    """The same tokens, when its first place is gone; of two saves of an iteration, those of the second."""
    monkeypatch.setattr(tokenizers, "_answers", lambda endpoint: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    args = KINDS[kind](tmp_path / "first")
    args.max_position_embeddings = 24
    step = tmp_path / "ck/iter_0000001"
    (step / "tokenizer").mkdir(parents=True)
    (step / "tokenizer/tokenizer_config.json").write_text("of a save that was broken off")
    settings = Namespace(**tokenizers.DEFAULTS | vars(args))
    tokenizer = None if kind == "GPT-2" else tokenizers.build(settings)
    assert tokenizers.carry_files(settings, tokenizer, step)
    assert [path.name for path in step.iterdir()] == ["tokenizer"]
    carry_tokenizer(args, tmp_path / "before")
    shutil.rmtree(tmp_path / "first")
    found, _ = placed(args, step)
    carry_tokenizer(found, tmp_path / "after")
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("before", "after"))
    assert len(before) == len(after) > 100
    for text in ("hello  world </s> 中", "<|turn|>x"):
        assert before(text)["input_ids"] == after(text)["input_ids"]


def test_nothing_is_left_of_what_cannot_be_carried(tmp_path: Path) -> None:
    settings = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "gone.model"))
    (tmp_path / "step/tokenizer").mkdir(parents=True)
    with pytest.raises(OSError, match=r"gone\.model"):
        tokenizers.carry_files(settings, None, tmp_path / "step")
    # What was there is there.
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["tokenizer"]
    for nothing in ({"tokenizer_type": "NullTokenizer"}, {"tokenizer_type": "SFTTokenizer", "tokenizer_model": "x"}):
        assert not tokenizers.carry_files(Namespace(**nothing), None, tmp_path / "step")
