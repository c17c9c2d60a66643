"""A corpus counts once, ids fit the vocabulary, and data sets that are joined have one tokenizer."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from sla_megatron.commands.data.cli import main
from tests.support.tokenizers import hugging_face_folder, train_sentencepiece

pytestmark = pytest.mark.filterwarnings("ignore")

LINES = "".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(20)).encode()
SP = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, without in (("a.model", ""), ("b.model", "e")):
        train_sentencepiece(folder / name, without=without, eos_id=2, pad_id=3)
    shutil.copy(folder / "a.model", folder / "copy.model")
    hugging_face_folder(folder / "hf")
    return folder


@pytest.fixture
def here(tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus with copies of itself, as users have them; the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("d/a.jsonl", "packed/a.jsonl", "hidden/a.jsonl", "hidden/.cache/a.jsonl", "hidden/.b.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(LINES)
    Path("packed/a.jsonl.gz").write_bytes(gzip.compress(LINES))
    Path("link").symlink_to("d")
    Path("linked.jsonl").symlink_to("d/a.jsonl")
    os.link("d/a.jsonl", "hard.jsonl")
    for name in ("a.model", "b.model", "copy.model"):
        shutil.copy(tokenizers / name, name)
    shutil.copytree(tokenizers / "hf", "hf")
    return tmp_path


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ("d/a.jsonl d/a.jsonl", "--input d/a.jsonl: expected each file once, it is the same file as d/a.jsonl"),
        ("d ./d/a.jsonl", "--input d/a.jsonl: expected each file once"),
        ("d/a.jsonl link/a.jsonl", "--input link/a.jsonl: expected each file once, it is the same file as d/a.jsonl"),
        ("d linked.jsonl", "--input linked.jsonl: expected each file once, it is the same file as d/a.jsonl"),
        ("d hard.jsonl", "--input hard.jsonl: expected each file once, it is the same file as d/a.jsonl"),
        ("d {here}/d/../d", "expected each file once, it is the same file as d/a.jsonl"),
        ("packed", "--input packed/a.jsonl.gz: expected each file once, it is the same text as packed/a.jsonl"),
        ("packed/a.jsonl.gz packed/a.jsonl", "it is the same text as packed/a.jsonl.gz"),
        ("packed/a.*", "--input packed/a.jsonl.gz: expected each file once, it is the same text as packed/a.jsonl"),
    ],
)
@pytest.mark.parametrize("command", ["tokenize", "tokenizer"])
def test_the_same_text_twice(command: str, inputs: str, line: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    output = (
        ["--output-prefix", "out", *SP, "a.model"]
        if command == "tokenize"
        else ["--vocab-size", "300", "--output", "out"]
    )
    assert line in refused(capsys, command, "--input", *inputs.format(here=here).split(), *output)
    assert not list(here.glob("out*"))


def test_hidden_copies_are_left_out_with_a_word(here: Path, capsys: pytest.CaptureFixture) -> None:
    """As a shell's patterns do; a hidden folder that is named counts."""
    main(["tokenize", "--input", "hidden", "--output-prefix", "out", *SP, "a.model"])
    said = capsys.readouterr()
    assert "sla-data: --input hidden: hidden, and left out: hidden/.b.jsonl and 1 more" in said.err
    assert "out: 20 documents" in said.out
    main(["tokenize", "--input", "hidden/.cache", "--output-prefix", "named", *SP, "a.model"])
    assert "named: 20 documents" in capsys.readouterr().out


def test_ids_beyond_the_vocabulary(here: Path, capsys: pytest.CaptureFixture) -> None:
    """A token far behind the others, which a model of that many tokens has no row for."""
    path = Path("hf/tokenizer.json")
    content = json.loads(path.read_text())
    content["model"]["vocab"]["qq"] = 9000
    content["model"]["merges"].append(["q", "q"])
    path.write_text(json.dumps(content))
    Path("d/a.jsonl").write_bytes(LINES + b'{"text": "a qq"}\n')
    given = ["tokenize", "--input", "d", "--output-prefix", "out", "--tokenizer-type", "HuggingFaceTokenizer"]
    given += ["--tokenizer-model", "hf"]
    line = refused(capsys, *given)
    assert "d/a.jsonl:21: " in line and "id 9000 is beyond the vocabulary of" in line
    main([*given, "--on-error", "skip"])
    assert "1 left out" in capsys.readouterr().out


def test_joining_data_of_different_tokenizers(here: Path, capsys: pytest.CaptureFixture) -> None:
    for prefix, model in (("one", "a.model"), ("two", "copy.model"), ("other", "b.model")):
        main(["tokenize", "--input", "d", "--output-prefix", prefix, *SP, model])
    main(["tokenize", "--input", "d", "--output-prefix", "parts", "--split", "1,1", *SP, "b.model"])
    line = refused(capsys, "merge", "one", "other", "--output-prefix", "out")
    assert line.endswith(
        "other was made with SentencePieceTokenizer b.model, one with SentencePieceTokenizer a.model: "
        "expected data sets of one tokenizer"
    )
    # A split's parts have the manifest of the whole; so has what was merged.
    assert "parts_train was made with" in refused(capsys, "merge", "one", "parts_train", "--output-prefix", "out")
    main(["merge", "one", "two", "--output-prefix", "both"])
    assert "other was made with" in refused(capsys, "merge", "both", "other", "--output-prefix", "out")
    # The same file by another name is the same tokenizer; another file of the same name is another.
    shutil.copy("b.model", "a.model")
    main(["tokenize", "--input", "d", "--output-prefix", "renamed", *SP, "a.model"])
    assert "whose files are others" in refused(capsys, "merge", "one", "renamed", "--output-prefix", "out")
    assert not list(here.glob("out*"))
    # What nobody wrote down is said to be unknown.
    Path("other.json").unlink()
    capsys.readouterr()
    main(["merge", "one", "other", "one", "--output-prefix", "out"])
    said = capsys.readouterr().err
    assert "no manifest says which tokenizer made other" in said
    assert "one is the same data set as one: its documents are there twice" in said
    assert json.loads(Path("both.json").read_text())["documents"] == 40
