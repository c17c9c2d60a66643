"""A command replaces what it made itself, and nothing else: no input, nothing beside it, nothing of anybody else's."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from examples.quickstart import workdir
from sla_megatron.commands.convert import cli as convert
from sla_megatron.commands.data import cli as data
from sla_megatron.commands.doctor import cli as doctor
from sla_megatron.commands.plan import cli as plan
from sla_megatron.commands.sweep import cli as sweep
from tests.support.convert_models import save_random_checkpoint
from tests.support.tokenizers import train_sentencepiece

pytestmark = pytest.mark.filterwarnings("ignore")

LINES = "".join(json.dumps({"text": f"line {number} of a corpus"}) + "\n" for number in range(40))
TOKENIZER = "--tokenizer-type SentencePieceTokenizer --tokenizer-model t.model"
COMMANDS = {
    "sla-convert": convert.main,
    "sla-data": data.main,
    "sla-doctor": doctor.main,
    "sla-plan": plan.main,
    "sla-sweep": sweep.main,
}


def run(line: str) -> tuple[int, str]:
    """One command in this process: its status, and the last line that it said."""
    words = line.split()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", words):
        try:
            main = COMMANDS[words[0]]
            main(words[1:]) if main in (data.main, sweep.main) else main()
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
    return status, ((err if status else out).getvalue().splitlines() or [""])[-1]


def tree(folder: Path) -> dict[str, str]:
    """Every file by its name, links by where they lead, folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link {os.readlink(path)}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user may have: a corpus, a tokenizer, two checkpoints with notes, data sets, exports, links."""
    root = tmp_path_factory.mktemp("template")
    with contextlib.chdir(root):
        train_sentencepiece(Path("t.model"), eos_id=2, pad_id=3)
        train_sentencepiece(Path("other.model"), without="e", eos_id=2, pad_id=3)
        Path("d").mkdir()
        Path("d/corpus.jsonl").write_text(LINES)
        Path("d/more.json").write_text(LINES)
        save_random_checkpoint(Path("ck"), {"sla": True, "sla_skip_distance": [3]})
        save_random_checkpoint(Path("dense"), {})
        Path("ck/notes.txt").write_text("mine")
        for line in (
            f"sla-data tokenize --input d/corpus.jsonl --output-prefix d/set {TOKENIZER}",
            f"sla-data tokenize --input d/more.json --output-prefix d/rest {TOKENIZER}",
            "sla-convert megatron-to-hf ck hf",
            "sla-convert megatron-to-hf ck noted",
            "sla-convert hf-to-megatron hf back",
        ):
            assert run(line)[0] == 0, line
        Path("noted/notes.txt").write_text("mine")
        Path("link").symlink_to("d")
        Path("linked").symlink_to("ck")
        Path("hf-link").symlink_to("hf")
    return root


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, and the working directory."""
    shutil.copytree(template, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


TOKENIZE = f"sla-data tokenize {TOKENIZER}"

#: What lies there as well, by name; the command; the line that refuses it.
REFUSED: list[tuple[dict[str, str], str, str]] = [
    # The manifest's name is a corpus's.
    (
        {"d/c.json": LINES},
        f"{TOKENIZE} --input d/c.json --output-prefix d/c",
        "d/c.json is an input, and d/c.json would",
    ),
    ({"c.json": LINES}, f"{TOKENIZE} --input d/corpus.jsonl --output-prefix c", "c.json is not sla-data's"),
    ({"c.json": "[1]"}, f"{TOKENIZE} --input d/corpus.jsonl --output-prefix c", "c.json is not sla-data's"),
    ({"c.json": "{}"}, f"{TOKENIZE} --input d/corpus.jsonl --output-prefix c", "c.json is not sla-data's"),
    ({"c.json": ""}, f"{TOKENIZE} --input d/corpus.jsonl --output-prefix c", "c.json is not sla-data's"),
    ({"c.json": "[1]"}, "sla-data merge d/set d/rest --output-prefix c", "c.json is not sla-data's"),
    # The same file by other names.
    ({}, f"{TOKENIZE} --input link/../d/more.json --output-prefix link/more", "more.json is an input"),
    ({}, f"{TOKENIZE} --input d/more.json --output-prefix ./d/../d/more", "more.json is an input"),
    # Other files that a job writes.
    (
        {"c.faults": "x"},
        f"{TOKENIZE} --input d/corpus.jsonl --output-prefix c",
        "c.faults exists, and is not this job's",
    ),
    ({"c.bin": "x"}, f"{TOKENIZE} --input d/corpus.jsonl --output-prefix c", "c.bin exists: expected another"),
    ({"c.idx": "x"}, f"{TOKENIZE} --input d/corpus.jsonl --output-prefix c", "c.idx exists: expected another"),
    (
        {"c_valid.bin": "x"},
        f"{TOKENIZE} --input d --output-prefix c --split 1,1",
        "c_valid.bin exists: expected another",
    ),
    ({"c.sla-data": "x"}, f"{TOKENIZE} --input d/corpus.jsonl --output-prefix c", "c.sla-data is not sla-data's"),
    (
        {"c.sla-data/settings.json": "{}", "c.sla-data/shards/00000000.json": "x"},
        f"{TOKENIZE} --input d/corpus.jsonl --output-prefix c",
        "c.sla-data is not sla-data's",
    ),
    ({"c.bin": LINES}, f"{TOKENIZE} --input c.bin --format jsonl --output-prefix c", "c.bin is an input"),
    ({"c.faults": LINES}, f"{TOKENIZE} --input c.faults --format jsonl --output-prefix c", "c.faults is an input"),
    # Data sets that are read.
    ({}, "sla-data merge d/set d/rest --output-prefix d/set", "set.bin is an input"),
    ({}, "sla-data merge d/set d/rest --output-prefix link/rest", "rest.bin is an input"),
    ({"c.bin": "x"}, "sla-data merge d/set --output-prefix c", "c.bin exists: expected another"),
    ({"c.faults": "x"}, "sla-data merge d/set --output-prefix c", "c.faults exists, and is not this job's"),
    # The text that a tokenizer is trained on.
    (
        {},
        "sla-data tokenizer --vocab-size 300 --input d --output link/more.json",
        "expected another file than the input",
    ),
    ({}, "sla-data inspect d/set --plot d", "expected a file name that ends in .png"),
    # A checkpoint's folder, by any spelling, and whatever holds it.
    ({}, "sla-convert megatron-to-hf ck/iter_0000007 ck", "ck holds what is read, ck/iter_0000007"),
    ({}, "sla-convert megatron-to-hf ck/iter_0000007 ck/iter_0000007", "holds what is read"),
    ({}, "sla-convert megatron-to-hf ck ck", "ck holds what is read, ck"),
    ({}, "sla-convert megatron-to-hf ck .", ". holds what is read, ck"),
    ({}, "sla-convert megatron-to-hf ck linked", "linked holds what is read, ck"),
    ({}, "sla-convert megatron-to-hf linked d/../ck", "ck holds what is read, linked"),
    ({}, "sla-convert megatron-to-hf ck dense", "was not made by sla-convert"),
    ({}, "sla-convert hf-to-megatron hf hf-link", "hf-link holds what is read, hf"),
    ({}, "sla-convert hf-to-megatron hf hf", "hf holds what is read, hf"),
    ({}, "sla-convert hf-to-megatron hf ck", "was not made by sla-convert: expected a new folder"),
    ({}, "sla-convert dense-to-sla dense dense", "dense holds what is read, dense"),
    ({}, "sla-convert dense-to-sla dense/iter_0000007 dense", "dense holds what is read"),
    # What somebody else put there, or changed.
    ({}, "sla-convert megatron-to-hf ck noted", "noted/notes.txt was not made by sla-convert"),
    ({"hf/sub/notes.txt": "x"}, "sla-convert megatron-to-hf ck hf", "hf/sub/notes.txt was not made by sla-convert"),
    (
        {"hf/config.json": "{}"},
        "sla-convert megatron-to-hf ck hf",
        "hf/config.json was changed since sla-convert wrote",
    ),
    ({"back/iter_0000001/x": "x"}, "sla-convert hf-to-megatron hf back", "x was not made by sla-convert"),
    ({"mine/sla_convert.json": "{}"}, "sla-convert megatron-to-hf ck mine", "was not made by sla-convert"),
    ({"file": "x"}, "sla-convert megatron-to-hf ck file", "file exists: expected a new folder"),
    # A plan of a run, in place of what the run reads.
    ({}, "sla-plan --tokenizer-model t.model --json t.model", "--json t.model: expected another file, t.model is read"),
    ({}, "sla-plan --load ck --json linked/notes.txt", "expected another file, ck is read"),
    ({"nodes": "my own notes"}, "sla-doctor --bad-nodes nodes", "expected a new file, or an earlier list of nodes"),
    ({}, "sla-doctor --bad-nodes t.model --tokenizer-model t.model", "expected another file, t.model is read"),
    ({}, "sla-plan --data-path d/set --json link/set.idx", "expected another file, d/set.idx is read"),
]


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("row", range(len(REFUSED)))
def test_refused_with_one_line(row: int, overwrite: bool, here: Path) -> None:
    """With ``--overwrite`` and without; everything is as it was, byte for byte."""
    files, line, message = REFUSED[row]
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    before = tree(here)
    status, said = run(f"{line} --overwrite" if overwrite else line)
    assert status == 2 and message in said, said
    assert tree(here) == before


#: Commands that are fine, each run twice: what may be there, and names that may change in the second run.
ACCEPTED = [
    # Into the folder that is read, and again: nothing of the first counts as input.
    (f"{TOKENIZE} --input d --output-prefix d/corpus", {"d/corpus.bin", "d/corpus.idx", "d/corpus.json"}),
    (
        f"sla-data submit --tasks 2 --local {TOKENIZER} --input d --output-prefix d/corpus",
        {"d/corpus.bin", "d/corpus.idx", "d/corpus.json"},
    ),
    ("sla-data merge d/set d/rest --output-prefix d/all", {"d/all.bin", "d/all.idx", "d/all.json"}),
    ("sla-convert megatron-to-hf ck ck/hf", {"ck/hf"}),
    ("sla-convert megatron-to-hf ck hf-link", {"hf"}),
    ("sla-convert hf-to-megatron hf d/back", {"d/back"}),
    ("sla-convert dense-to-sla dense dense/sla", {"dense/sla"}),
    ("sla-data tokenizer --vocab-size 300 --input d --output d/new.model", {"d/new.model"}),
]


@pytest.mark.parametrize(("line", "made"), ACCEPTED)
def test_its_own_is_replaced(line: str, made: set[str], here: Path) -> None:
    """With ``--overwrite`` twice; beside it nothing has changed."""

    def others() -> dict[str, str]:
        return {k: v for k, v in tree(here).items() if not any(k == m or k.startswith(f"{m}/") for m in made)}

    before = others()
    for _ in range(2):
        status, said = run(f"{line} --overwrite")
        assert status == 0, said
    assert others() == before
    assert made <= tree(here).keys()


def test_replaced_when_the_new_one_is_whole(here: Path) -> None:
    """A job that ends early with ``--overwrite`` leaves the earlier data set; the same command goes on."""
    job = f"{TOKENIZE} --input d/corpus.jsonl --output-prefix d/set"
    earlier = {name: Path(name).read_bytes() for name in ("d/set.bin", "d/set.idx", "d/set.json")}
    Path("d/corpus.jsonl").write_text(LINES.replace("line", "row") + "no JSON\n")
    status, said = run(f"{job} --overwrite --shard-mb 0.001")
    assert status == 2 and "d/corpus.jsonl:41: not a JSON object" in said
    assert {name: Path(name).read_bytes() for name in earlier} == earlier
    assert run(f"{job} --shard-mb 0.001 --on-error skip") == (
        0,
        "1 left out: not a JSON object (not-json in d/set.faults)",
    )
    assert Path("d/set.bin").read_bytes() != earlier["d/set.bin"]
    assert sorted(path.name for path in Path("d").glob("*set*")) == ["set.bin", "set.faults", "set.idx", "set.json"]


def test_going_on_in_the_folder_that_is_read(here: Path) -> None:
    """What a job left there when it was interrupted, finished or not, is no input of it."""
    Path("d/last.txt").write_bytes(b"good\n\xff\n")
    job = f"{TOKENIZE} --input d --output-prefix d/corpus --shard-mb 0.001"
    status, said = run(job)
    assert status == 2 and "d/last.txt:2: not UTF-8" in said
    assert len(list(Path("d/corpus.sla-data/shards").glob("*.json"))) > 1
    assert run(f"{job} --on-error skip")[0] == 0
    made = json.loads(Path("d/corpus.json").read_text())
    assert [Path(one["file"]).name for one in made["settings"]["inputs"]["sources"]] == [
        "corpus.jsonl",
        "last.txt",
        "more.json",
    ]
    assert made["documents"] == 81
    finished = tree(here)
    assert run(f"{job} --on-error skip")[0] == 0
    assert tree(here) == finished


def test_what_came_while_a_job_was_interrupted(here: Path) -> None:
    """A data set that somebody else made at the job's name meanwhile is not replaced when the job goes on."""
    Path("d/bad.jsonl").write_text(LINES + "no JSON\n")
    job = f"{TOKENIZE} --input d/bad.jsonl --output-prefix d/new"
    assert run(job)[0] == 2
    for suffix in (".bin", ".idx"):
        shutil.copy(f"d/rest{suffix}", f"d/new{suffix}")
    before = tree(here)
    status, said = run(f"{job} --on-error skip")
    assert status == 2 and "d/new.bin exists: expected another --output-prefix, or --overwrite" in said
    assert tree(here) == before


def test_folders_of_others(here: Path) -> None:
    """A marker's name alone marks nothing; the quickstart's folders with others' files are not removed."""
    Path("mine").mkdir()
    Path("mine/sweep.json").write_text('{"grid": 1}')
    status, said = run("sla-sweep report --out mine")
    assert status == 2 and "expected a sweep's folder" in said
    for settings_json, name in (({"editor": 1}, "data/x.csv"), ({"tp": 1}, "data/x.csv"), ({"tp": 1}, "dense/notes")):
        folder = Path(f"quick-{len(list(here.iterdir()))}")
        workdir.write_json(folder / workdir.SETTINGS, settings_json)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        before = tree(here)
        with pytest.raises(workdir.WorkdirError, match="^--out "):
            workdir.clear(folder)
        assert tree(here) == before


def on_data(draw: st.DrawFn) -> str:
    """A command that writes data, its inputs and outputs at a few places, by any spelling."""
    prefixes = st.builds("{}/{}".format, st.sampled_from((".", "d", "link", "./d/../link")), st.sampled_from(NAMES))
    texts = st.sampled_from(("d", "link", "d/corpus.jsonl", "link/more.json", "d/*.json*", "."))
    kind = draw(st.sampled_from(("tokenize", "split", "merge", "tokenizer")))
    if kind == "merge":
        return f"sla-data merge {draw(prefixes)} {draw(prefixes)} --output-prefix {draw(prefixes)}"
    if kind == "tokenizer":
        return f"sla-data tokenizer --vocab-size 290 --input {draw(texts)} --output {draw(prefixes)}"
    more = " --split 9,1" if kind == "split" else ""
    return f"{TOKENIZE} --on-error skip --input {draw(texts)} --output-prefix {draw(prefixes)}{more}"


def on_models(draw: st.DrawFn) -> str:
    """A command that converts, from and to any folder."""
    places = ("ck", "linked", "ck/iter_0000007", "dense", "hf", "hf-link", "noted", "back", "d/new", "ck/new", ".")
    command, source = draw(
        st.sampled_from((("megatron-to-hf", "ck"), ("hf-to-megatron", "hf"), ("dense-to-sla", "dense")))
    )
    return f"sla-convert {command} {draw(st.sampled_from((source, source, *places)))} {draw(st.sampled_from(places))}"


NAMES = ("set", "more", "new")
_ENDS = (".json", ".bin", ".idx", ".faults", "_train.bin", ".sla-data/settings.json", ".sla-data/merged/x.bin")
#: For each kind of command, where files of anybody's lie in its way.
KINDS = {
    "data": (on_data, [f"{folder}/{name}{end}" for folder in (".", "d") for name in NAMES for end in _ENDS]),
    "models": (
        on_models,
        [f"{at}/{name}" for at in ("hf", "back/release", "d/new") for name in ("mine", "config.json")],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
# Shrinking an example takes minutes.
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(drawn=st.data())
def test_nothing_that_it_did_not_make_is_gone(
    template: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, drawn: st.DataObject
) -> None:
    """Whatever is read, written and in the way: what a command did not make is there as it was."""
    command, names = KINDS[kind]
    files = drawn.draw(st.lists(st.sampled_from(names), min_size=2, max_size=6, unique=True))
    content = drawn.draw(st.sampled_from(("mine", LINES, "[1]", "{}")))
    root = tmp_path_factory.mktemp("any") / "copy"
    shutil.copytree(template, root, symlinks=True)
    # What the template's own commands made may go.
    made = {k for k in tree(root) if k.split("/")[0] in ("hf", "back") or k.startswith(("d/set.", "d/rest."))}
    with contextlib.chdir(root):
        for name in files:
            if not Path(name).exists() and not any(p.is_file() for p in Path(name).parents):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_text(content)
        for _ in range(3):
            line = drawn.draw(st.composite(command)()) + drawn.draw(st.sampled_from((" --overwrite",) * 3 + ("",)))
            before = tree(root)
            status, said = run(line)
            after = tree(root)
            assert status in (0, 2), (line, said)
            gone = {name for name in before if after.get(name) != before[name]}
            if status:
                assert not gone and after.keys() - before.keys() <= unfinished(after), (line, said, gone)
            words = line.split()
            if "--output" in words:
                # The flag names the file itself.
                gone -= {os.path.relpath(os.path.realpath(words[words.index("--output") + 1]), root)}
            assert gone <= made, (line, gone - made)
            made |= after.keys() - before.keys()
    shutil.rmtree(root)


def unfinished(names: dict[str, str]) -> set[str]:
    """What a job that was ended by a faulty document leaves to go on from, and the folders of it."""
    return {name for name in names if ".sla-data" in name or name == "d/deep"}
