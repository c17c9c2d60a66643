"""``docs/cards``: none is older than the code that it covers, and the pages are what the JSON files say."""

from __future__ import annotations

import ast
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sla_megatron.common.files import read_json, write_json
from tests.support import cards, cards_page, cards_run
from tests.support.launch import ROOT
from tests.support.workflows import Workflow

COMMITTED = ROOT / cards.CARDS

#: What a card says beside its workflow, test and files.
FOUND = {
    "command": "sla-convert describe checkpoints",
    "results": {"largest error": 1.25e-7, "losses": [4.5, 4.25], "bytes": 2048, "state": "finished"},
    "machine": {"device": "cpu", "processor": "A processor", "cores": 2, "threads": 1, "torch": "2.15.0"},
    "commit": "0123456789ab",
    "date": "2026-11-27",
}

ROUTES = "sla_megatron/pipeline/routes.py"
SCRIPT = "launch/slurm.sbatch"


class Copies(NamedTuple):
    """Cards and pages in ``folder``, of the files in ``root``: to be broken."""

    folder: Path
    root: Path

    def faults(self) -> list[str]:
        return cards.faults(self.folder, self.root)

    def edit(self, path: str, how: Callable[[str], str]) -> None:
        before = (self.root / path).read_text()
        (self.root / path).write_text(how(before))
        assert (self.root / path).read_text() != before


@pytest.fixture
def copies(tmp_path: Path) -> Copies:
    """Of all workflows, and of what they cover."""
    made = Copies(tmp_path / "cards", tmp_path / "root")
    made.folder.mkdir()
    for name, workflow in cards.WORKFLOWS.items():
        covers = cards.digests(workflow.covers)
        for path in covers:
            (made.root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, made.root / path)
        write_json(made.folder / f"{name}.json", {"workflow": name, "test": workflow.test, **FOUND, "covers": covers})
    cards_page.main(["--folder", str(made.folder)])
    assert made.faults() == [] and cards_page.differing(made.folder) == []
    return made


def test_no_card_is_older_than_its_code() -> None:
    """Every workflow has one; a line for each file that changed since."""
    assert cards.faults(COMMITTED) == []


def test_the_committed_pages_are_what_the_cards_say() -> None:
    cards_page.main(["--check"])


@pytest.mark.parametrize("name", cards.WORKFLOWS)
def test_the_test_of_a_workflow_leaves_its_card(name: str) -> None:
    """It is there, takes the fixture, and names the workflow; what is covered is there too."""
    path, _, words = cards.WORKFLOWS[name].test.partition("::")
    functions = [node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
    (test,) = [node for node in functions if node.name == words.partition("[")[0]]
    assert "card" in [argument.arg for argument in test.args.args]
    calls = [node for node in ast.walk(test) if isinstance(node, ast.Call) and ast.unparse(node.func) == "card"]
    assert [call.args[0].value for call in calls] == [name]
    assert path in cards.digests(cards.WORKFLOWS[name].covers)
    assert [each for each in cards.WORKFLOWS[name].covers if not cards.digests([each])] == []
    assert (COMMITTED / cards.WORKFLOWS[name].page).is_file()


@pytest.mark.parametrize(
    ("path", "how"),
    [
        (ROUTES, lambda text: text + "\nLATER = 1\n"),
        (ROUTES, lambda text: text.replace(" + 1", " + 2", 1)),
        (ROUTES, lambda text: text.replace("    def ", "    def other(self) -> None:\n        pass\n\n    def ", 1)),
        (SCRIPT, lambda text: text + "# A comment, which a shell's file is not read without.\n"),
        ("tests/test_pipeline.py", lambda text: text.replace("1e-6", "1e-5", 1)),
    ],
    ids=["statement", "number", "function", "script", "tolerance"],
)
def test_changed_code_makes_a_card_old(copies: Copies, path: str, how: Callable[[str], str]) -> None:
    """Of each workflow that covers the file, which is named."""
    copies.edit(path, how)
    old = [name for name, workflow in cards.WORKFLOWS.items() if path in cards.digests(workflow.covers)]
    assert old and copies.faults() == [f"card {name} is older than {path}: make cards" for name in old]


@pytest.mark.parametrize(
    "how",
    [
        lambda text: text.replace('"""', '"""Otherwise. ', 1),
        lambda text: text.replace('    """', '    """Otherwise. ', 1),
        lambda text: f"# Why.\n{text}# Whence.\n",
        lambda text: text.replace("\n\n", "\n\n\n"),
        lambda text: text.replace("@dataclass(frozen=True)", "@dataclass(\n    frozen=True,\n)"),
    ],
    ids=["module", "class", "comments", "blank lines", "line break"],
)
def test_another_comment_does_not(copies: Copies, how: Callable[[str], str]) -> None:
    copies.edit(ROUTES, how)
    assert copies.faults() == []


def test_files_that_came_and_went(copies: Copies) -> None:
    """Make old what covers their folder; a page on the code does not."""
    (copies.root / "sla_megatron/pipeline/later.py").write_text("")
    (copies.root / "sla_megatron/commands/sweep/cli.py").unlink()
    (copies.root / "patches/README.md").write_text("")
    assert copies.faults() == [
        "card pipeline is older than sla_megatron/pipeline/later.py: make cards",
        "card sweep is older than sla_megatron/commands/sweep/cli.py: make cards",
    ]


def test_cards_that_are_not_there_or_of_another_test(copies: Copies) -> None:
    (copies.folder / "engine.json").unlink()
    write_json(copies.folder / "cooking.json", {})
    card = read_json(copies.folder / "sweep.json")
    write_json(copies.folder / "sweep.json", card | {"test": "tests/test_sweep.py::test_before"})
    assert copies.faults() == [
        "workflow engine has no card: make cards",
        "card cooking is of no workflow",
        "card sweep is of tests/test_sweep.py::test_before: make cards",
    ]


def break_page(folder: Path) -> None:
    path = folder / "pipeline.md"
    path.write_text(path.read_text().replace("1.25e-07", "1.15e-07"))


def break_card(folder: Path) -> None:
    write_json(folder / "pipeline.json", read_json(folder / "pipeline.json") | {"date": "2026-11-28"})


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (break_page, "pipeline.md"),
        (break_card, "index.md, pipeline.md"),
        (lambda folder: (folder / "index.md").unlink(), "index.md"),
        (lambda folder: (folder / "engine.json").unlink(), "engine.md, index.md"),
        (lambda folder: (folder / "before.md").write_text(""), "before.md"),
    ],
    ids=["an edited page", "an edited card", "no index", "no card", "a page of nothing"],
)
def test_a_page_that_is_not_what_the_cards_say(copies: Copies, how: Callable[[Path], Any], named: str) -> None:
    """Is found, named, and written anew or removed."""
    how(copies.folder)
    arguments = ["--folder", str(copies.folder)]
    with pytest.raises(SystemExit, match=f"^{named} of .*: run python -m tests.support.cards_page$"):
        cards_page.main(["--check", *arguments])
    cards_page.main(arguments)
    cards_page.main(["--check", *arguments])


def test_a_page_has_what_was_run_and_came_out(copies: Copies) -> None:
    page = (copies.folder / "pipeline.md").read_text()
    for text in ("sla-convert describe checkpoints", "1.25e-07", "4.5; 4.25", "2,048", "finished", "torch 2.15.0"):
        assert text in page
    for text in ("A processor, 2 cores, no GPU", "2026-11-27", "0123456789ab", "`sla_megatron/pipeline` ("):
        assert text in page


def test_a_card_is_written_where_one_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the test of the workflow, with its parameters, alone."""
    monkeypatch.setattr(cards, "WORKFLOWS", {"one": sample("tests/test_one.py::test_it[a]")})
    for node, folder in (("tests/test_one.py::test_it[a]", None), ("tests/test_one.py::test_it[b]", str(tmp_path))):
        cards.leave(node, folder, "one", "command", lambda: pytest.fail("not asked for"))
        assert list(tmp_path.iterdir()) == []
    cards.leave("tests/test_one.py::test_it[a]", str(tmp_path), "one", "command", lambda: {"figure": 1})
    card = read_json(tmp_path / "one.json")
    assert (card["results"], card["command"], card["covers"]) == ({"figure": 1}, "command", cards.digests([ROUTES]))
    assert {"torch", "megatron-core", "python", "pytest", "processor", "cores"} <= card["machine"].keys()
    assert cards.faults(tmp_path) == [] and [path.name for path in tmp_path.iterdir()] == ["one.json"]


def sample(test: str, **changes: Any) -> Workflow:
    """A workflow that covers one file."""
    workflow = Workflow("One", "It runs.", "../pipeline.md", test, (ROUTES,), ("pytest",))
    return dataclasses.replace(workflow, **changes)


@pytest.mark.parametrize("python", ["/bin/false", "/bin/true"])
def test_a_test_that_leaves_no_card_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, python: str
) -> None:
    """Whether it failed or was skipped; what was there stays."""
    monkeypatch.setattr(cards, "WORKFLOWS", {"one": sample("tests/test_one.py::test_it", python=python)})
    (tmp_path / "one.json").write_text('{"workflow": "one", "not_run": "before"}')
    with pytest.raises(SystemExit, match="^cards: failed: one$"):
        cards_run.main(["--folder", str(tmp_path)])
    assert "one: left no card" in capsys.readouterr().out
    assert "Not run: before." in (tmp_path / "one.md").read_text()


def test_what_cannot_run_here_keeps_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without one, its page says so, and why."""
    monkeypatch.setattr(cards, "WORKFLOWS", {"one": sample("tests/test_one.py::test_it", missing=lambda: "no oven")})
    cards_run.main(["--folder", str(tmp_path)])
    assert "one: not run: no oven" in capsys.readouterr().out
    assert "Not run: no oven." in (tmp_path / "one.md").read_text() and "not run" in (tmp_path / "index.md").read_text()
    card = {"workflow": "one", "test": "tests/test_one.py::test_it", **FOUND, "covers": cards.digests([ROUTES])}
    write_json(tmp_path / "one.json", card)
    cards_run.main(["one", "--folder", str(tmp_path)])
    assert "one: not run, its card stays: no oven" in capsys.readouterr().out
    assert read_json(tmp_path / "one.json") == card and "1.25e-07" in (tmp_path / "one.md").read_text()


def test_a_card_that_there_is_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        cards_run.main(["cooking", "--folder", str(tmp_path / "new")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cooking: expected one of first-run, slurm-job, pipeline" in said
    assert not (tmp_path / "new").exists()
