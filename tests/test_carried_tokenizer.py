"""A checkpoint's own tokenizer: written by training and by conversions, found again when everything else is gone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from sla_megatron.common.checkpoint_folders import newest_complete
from tests.support.runs import argv, train
from tests.support.tokenizers import hugging_face_folder

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

#: Our entry point, for which the tokenizer's file is gone once it has been read.
REMOVED = """
import functools
from pathlib import Path
from sla_megatron.training import data
original = data.train_valid_test_datasets

@functools.wraps(original)
def provide(*args, **kwargs):
    found = original(*args, **kwargs)
    Path("{}").unlink(missing_ok=True)
    return found

data.train_valid_test_datasets = provide
from sla_megatron.pretrain_gpt import main
try:
    main()
finally:
    data.train_valid_test_datasets = original
"""
Convert = Callable[..., tuple[int, str]]


def small_sentencepiece(path: Path) -> Path:
    """A model of few tokens, which fit into a small vocabulary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four", "two one four three"] * 20),
        model_prefix=str(path.with_suffix("")),
        vocab_size=40,
        hard_vocab_limit=False,
        model_type="bpe",
        minloglevel=2,
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Saves of runs with --sla and without, of each kind of tokenizer; the tokenizers are gone afterwards."""
    folder = tmp_path_factory.mktemp("trained")
    model = small_sentencepiece(folder / "in/a.model")
    hugging_face_folder(folder / "in/hf")
    base = {"tensor_model_parallel_size": 1, "make_vocab_size_divisible_by": 128, "train_iters": 2, "save_interval": 1}
    base |= {"vocab_size": None, "sla": True, "eval_iters": 0}
    spm = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": model}
    runs = {
        "sentencepiece": spm,
        "hugging-face": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": folder / "in/hf"},
        "null": {"tokenizer_type": "NullTokenizer", "vocab_size": 127},
        "dense": spm | {"sla": None},
    }
    requests = {name: {"argv": argv(**base | flags, save=folder / name / "ck")} for name, flags in runs.items()}
    small_sentencepiece(folder / "gone.model")
    (folder / "gone.py").write_text(REMOVED.format(folder / "gone.model"))
    flags = base | spm | {"tokenizer_model": folder / "gone.model", "save": folder / "gone/ck"}
    requests["gone"] = {"argv": argv(**flags), "entry": str(folder / "gone.py")}
    answers = train(requests, 1, folder / "ranks")
    shutil.rmtree(folder / "in")
    return folder, answers


@pytest.mark.parametrize("name", ["sentencepiece", "hugging-face"])
def test_training_carries_its_tokenizer(name: str, trained: tuple[Path, dict[str, Any]], convert: Convert) -> None:
    """Each checkpoint has it, complete; an export needs nothing else, wherever the checkpoint is taken."""
    from transformers import AutoTokenizer

    folder, answers = trained
    assert answers[name]["status"] == 0, answers[name]["stderr"]
    for step in (1, 2):
        carried = folder / name / f"ck/iter_{step:07d}/tokenizer"
        files = sorted(path.name for path in carried.iterdir())
        assert ("tokenizer.json" in files) if name == "hugging-face" else (files == ["tokenizer.model"])
        assert not list(carried.parent.glob(".tokenizer*"))
    assert newest_complete(folder / name / "ck") == (2, {})
    # Taken elsewhere, one iteration alone.
    shutil.copytree(folder / name / "ck/iter_0000002", folder / name / "moved")
    status, said = convert("megatron-to-hf", folder / name / "moved", folder / name / "hf", "--verify")
    assert status == 0 and "logits equal" in said, said
    assert str(folder / name / "moved/tokenizer") in said
    tokenizer = AutoTokenizer.from_pretrained(folder / name / "hf")
    assert tokenizer.decode(tokenizer("one two")["input_ids"], skip_special_tokens=True) == "one two"
    assert tokenizer.model_max_length == 16
    assert tokenizer(f"one{tokenizer.eos_token}")["input_ids"][-1] == tokenizer.eos_token_id


def test_special_tokens_as_text(trained: tuple[Path, dict[str, Any]], convert: Convert, tmp_path: Path) -> None:
    """As pretraining splits them, on request; no request can change what pretraining finds in text itself."""
    from transformers import AutoTokenizer

    folder, _ = trained
    status, said = convert("megatron-to-hf", folder / "sentencepiece/ck", tmp_path / "hf", "--special-tokens-as-text")
    assert status == 0, said
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token_id not in tokenizer("one</s>")["input_ids"]
    status, said = convert("megatron-to-hf", folder / "hugging-face/ck", tmp_path / "no", "--special-tokens-as-text")
    assert status == 2 and "finds its special tokens in text in Megatron too (--special-tokens-as-text)" in said
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["null", "dense"])
def test_where_there_is_none_or_upstream_is_left_alone(name: str, trained: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = trained
    assert answers[name]["status"] == 0, answers[name]["stderr"]
    assert not (folder / name / "ck/iter_0000002/tokenizer").exists()


def test_what_was_tried_is_said(trained: tuple[Path, dict[str, Any]], convert: Convert, tmp_path: Path) -> None:
    """One line with each path; and one that the user names wins over what the checkpoint holds."""
    folder, _ = trained
    status, said = convert("megatron-to-hf", folder / "dense/ck", tmp_path / "out")
    line = f"tokenizer model {folder}/in/a.model of the checkpoint is not there: --tokenizer-model PATH; tried "
    assert status == 2 and line in said
    assert len([line for line in said.splitlines() if line.startswith("sla-convert")]) == 1
    step = folder / "dense/ck/iter_0000002"
    assert f"{step}/tokenizer/tokenizer.model, " in said and f"{step}/a.model, {step.parent}/a.model\n" in said
    given = small_sentencepiece(tmp_path / "b.model")
    status, said = convert(
        *("megatron-to-hf", folder / "sentencepiece/ck", tmp_path / "out", "--tokenizer-model", given)
    )
    assert status == 0 and f"tokenizer: SentencePieceTokenizer {given}" in said
    # Beside the checkpoint it is found by its name.
    shutil.copy(given, folder / "dense/ck/a.model")
    try:
        status, said = convert("megatron-to-hf", folder / "dense/ck", tmp_path / "out2")
        assert status == 0 and f"tokenizer: SentencePieceTokenizer {folder}/dense/ck/a.model" in said
    finally:
        (folder / "dense/ck/a.model").unlink()


def test_dense_to_sla_carries_it_on(trained: tuple[Path, dict[str, Any]], convert: Convert, tmp_path: Path) -> None:
    """Of a dense run's checkpoint, whose tokenizer the user names, and of one that holds its own."""
    folder, _ = trained
    given = small_sentencepiece(tmp_path / "b.model")
    start = ("--sla-skip-distance", "2")
    status, said = convert(*("dense-to-sla", folder / "dense/ck", tmp_path / "a", "--tokenizer-model", given, *start))
    assert status == 0, said
    given.unlink()
    assert [path.name for path in (tmp_path / "a/release/tokenizer").iterdir()] == ["tokenizer.model"]
    status, said = convert("megatron-to-hf", tmp_path / "a", tmp_path / "hf")
    assert status == 0 and f"{tmp_path}/a/release/tokenizer/tokenizer.model" in said, said


def test_a_tokenizer_that_cannot_be_copied_costs_no_checkpoint(trained: tuple[Path, dict[str, Any]]) -> None:
    """Of a run whose tokenizer was removed once it was read: one line a checkpoint, which is complete."""
    folder, answers = trained
    assert answers["gone"]["status"] == 0, answers["gone"]["stderr"]
    lines = [line for line in answers["gone"]["stderr"].splitlines() if "tokenizer" in line]
    for step, line in zip((1, 2), lines, strict=True):
        place = folder / f"gone/ck/iter_{step:07d}"
        assert re.fullmatch(rf"sla-megatron: the tokenizer is not in {place}: .*No such file.*gone\.model'", line)
        assert not list(place.glob("*tokenizer*")) and not list(place.glob(".tokenizer*"))
    assert newest_complete(folder / "gone/ck") == (2, {})
