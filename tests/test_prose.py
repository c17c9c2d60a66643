"""The prose of packages' docstrings: what counts as prose, and in which order it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.quickstart import prose
from examples.quickstart.corpus import CorpusError

#: Sentences, as a docstring has them.
TEXT = (
    "This function reads a file and returns what it found there, line by line, without the spaces at the end of each. "
    "It never raises an error for a file that is empty."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT, True),
        (TEXT + " (See the manual of the parser.)", True),
        # A heading, and a sentence that is not ended.
        ("Reads a file and returns what it found.", False),
        (TEXT.rstrip("."), False),
        (TEXT + " >>> read(path).", False),
        ("| name | meaning | " + TEXT, False),
        # 85 of 100 words: beside these 33 there may be 5 others.
        ("x_1=f(a,b) " * 5 + TEXT, True),
        ("x_1=f(a,b) " * 6 + TEXT, False),
    ],
    ids=["sentences", "in brackets", "short", "not ended", "session", "table", "some code", "code"],
)
def test_what_is_prose(text: str, expected: bool) -> None:
    assert prose.is_prose(text, text.split()) is expected


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Thirty modules with a paragraph of their own and one that all share; and what is not read."""
    for i in range(30):
        folder = tmp_path / ("numpy" if i % 2 else "torch/nn")
        folder.mkdir(parents=True, exist_ok=True)
        own = TEXT.replace("a file", f"{'abcdefghij'[i // 3]}{'klm'[i % 3]} things")
        body = f'"""{own}\n\n    {TEXT}\n\n    >>> f({i})\n    """\n\n' + f"def f(x):\n    return x + {i}\n\n" * 40
        (folder / f"module_{i}.py").write_text(body)
    for name in ("other/module.py", "numpy/small.py", "numpy/broken.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "other" / "module.py").write_text(f'"""Left out. {TEXT}"""\n' + "x = 1\n" * 400)
    (tmp_path / "numpy" / "small.py").write_text(f'"""Left out. {TEXT}"""\n')
    (tmp_path / "numpy" / "broken.py").write_text("def (:\n" * 400)
    return tmp_path


def test_documents_are_the_new_paragraphs_of_files(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One a file; what all share is in the first alone, and code in none."""
    documents = prose.read_documents(10**6, packages)
    assert len(documents) == 30 and len(set(documents)) == 30
    assert [TEXT in document for document in documents] == [True] + 29 * [False]
    assert not any("Left out" in document or ">>>" in document or "return x" in document for document in documents)
    assert capsys.readouterr().err.startswith("prose:")


def test_a_limit_is_a_prefix(packages: Path) -> None:
    """The order does not depend on how much is read, nor on the order of names."""
    whole = prose.read_documents(10**6, packages)
    limit = sum(len(document.encode()) for document in whole[:25]) + 10
    assert prose.read_documents(limit, packages) == whole[:25]
    assert whole != sorted(whole)


def test_too_little_prose(packages: Path) -> None:
    with pytest.raises(CorpusError, match=r"only \d+ files with prose within 1000 bytes in"):
        prose.read_documents(1000, packages)
