"""The pages: what they promise is there, and they are a site; broken copies are caught."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import sla_megatron
from tests.support.documented.flags import unknown_words
from tests.support.documented.links import dead_links
from tests.support.documented.names import wrong_names
from tests.support.documented.site import build_site, in_site, misread_pages, own_pages
from tests.support.launch import ROOT

# Of Megatron's own making.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:'type' is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built without a warning."""
    out = tmp_path_factory.mktemp("site")
    assert build_site(ROOT, out) == []
    return out


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository of two pages, a picture and a source, with what makes it a site; to be broken."""
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs" / "site", tmp_path / "docs" / "site")
    shutil.copytree(ROOT / "sla_megatron" / "common", tmp_path / "sla_megatron" / "common")
    (tmp_path / "sla_megatron" / "__init__.py").touch()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "run.sh").write_text("echo run\n")
    (tmp_path / "docs" / "picture.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>\n')
    (tmp_path / "README.md").write_text(
        "# Home\n\n[Page](docs/page.md#two-words) [script](launch/run.sh)\n\n![drawn](docs/picture.svg)\n"
    )
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n[Home](../README.md)\n\n## Two words\n")
    (tmp_path / "docs" / "api.md").write_text("# Names\n\n::: sla_megatron.common.errors.FlagError\n")
    return tmp_path


NAV = ["README.md", "docs/page.md", "docs/api.md"]


# Links


def test_links_lead_somewhere() -> None:
    assert dead_links(ROOT) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[gone](docs/gone.md)", "there is no such file"),
        ("![gone](docs/gone.svg)", "there is no such file"),
        ("[x](docs/page.md#three-words)", "there is no heading of docs/page.md with that anchor"),
        ("[x](#nowhere)", "there is no heading of README.md with that anchor"),
        ("[x](../elsewhere.md)", "expected a path within the repository"),
        ("[x](https://host)", "expected https://HOST/PATH"),
        ("| a |\n|---|\n| [gone](gone.md) |", "there is no such file"),
    ],
    ids=["page", "picture", "anchor", "own-anchor", "outside", "host", "in-a-table"],
)
def test_a_dead_link_is_found(small: Path, line: str, fault: str) -> None:
    """Beside it all is well: there is one fault."""
    with (small / "README.md").open("a") as file:
        file.write(f"\n{line}\n")
    found = dead_links(small)
    assert len(found) == 1 and found[0].startswith("README.md:") and found[0].endswith(f": {fault}"), found


def test_code_has_no_links(small: Path) -> None:
    with (small / "README.md").open("a") as file:
        file.write("\n`[gone](gone.md)`\n\n```\n[gone](gone.md)\n```\n")
    assert dead_links(small) == []


# Commands


def test_commands_know_their_words() -> None:
    """Flags, subcommands, modules and targets of every command on every page, and flags that stand alone."""
    assert unknown_words(ROOT) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```sh\nlaunch/local.sh --sla --sla-skip-distanse 3\n```", "--sla-skip-distanse"),
        ("```sh\nA=1 sla-pretrain \\\n    --num-layer 3\n```", "--num-layer"),
        ("```sh\nsbatch --nods=2 launch/slurm.sbatch --sla\n```", "--nods"),
        ("```sh\nsbatch --nodes=2 launch/slurm.sbatch --nodes 2\n```", "--nodes"),
        ('```sh\nsla-plan $(launch/presets.sh "7b sla") --sugest\n```', "--sugest"),
        ("```sh\nsla-doctor --suggest\n```", "--suggest"),
        ("`sla-convert prune EXPORT OUT --verify --prune`", "--prune"),
        ("`sla-convert\nprun EXPORT`", "sla-convert prun"),
        ("`sla-data submit --tasks 2 -- --tme=1`", "--tme"),
        ("```\nsla-job check --run runs -- --slaa\n```", "--slaa"),
        ("`sla-sweep report --out x --jsn`", "--jsn"),
        ("`sla-eval --model x --task y`", "--task"),
        ("`sla-patch aply DIR`", "sla-patch aply"),
        ("`torchrun --nproc-per-node 2 -m examples.encoder.run --step 3`", "--step"),
        ("`python -m benchmarks.generation --prompt 1`", "--prompt"),
        ("`python -m benchmarks.no_such --prompts 1`", "no such module"),
        ("`make gpureport`", "make gpureport"),
        ("`make gpu-report MINUTE=3`", "MINUTE"),
        ('`make gpu-report GPU_REPORT_ARGS="--row checks"`', "--row"),
        ("| a |\n|---|\n| `--sla-layer 3` |", "--sla-layer"),
    ],
)
def test_a_wrong_word_is_found(tmp_path: Path, text: str, fault: str) -> None:
    """Also in a part of a line, behind a comment's end, and in a table."""
    (tmp_path / "page.md").write_text(f"# Page\n\n{text}\n")
    if fault in ("--nods", "--tme") and not shutil.which("sbatch"):
        pytest.skip("needs sbatch, which lists its options")
    found = unknown_words(tmp_path)
    assert len(found) == 1 and fault in found[0].partition(": ")[2], found


# Public names


def test_every_public_name_has_an_entry() -> None:
    assert wrong_names(ROOT, sla_megatron._HOME) == []


def test_a_name_without_an_entry_is_found(small: Path) -> None:
    """And an entry without a name, and one that is there twice."""
    assert wrong_names(small, {"FlagError": "common.errors"}) == []
    assert wrong_names(small, {"FlagError": "common.errors", "refuse": "common.errors"}) == [
        "docs/api.md: sla_megatron.common.errors.refuse: no entry of a public name"
    ]
    with (small / "docs" / "api.md").open("a") as file:
        file.write("\n::: sla_megatron.common.errors.FlagError\n")
    assert wrong_names(small, {}) == [
        *2 * ["docs/api.md: sla_megatron.common.errors.FlagError: no public name"],
        "docs/api.md: sla_megatron.common.errors.FlagError: two entries",
    ]


# The site


def test_the_site_has_every_page(site: Path) -> None:
    """Of the repository, but for notes on test data."""
    assert [page for page in own_pages(ROOT) if not in_site(ROOT, site, page).is_file()] == []


def test_pages_are_as_in_a_view_of_the_repository(site: Path) -> None:
    assert misread_pages(ROOT, site) == []


def test_a_misread_page_is_found(small: Path, tmp_path: Path) -> None:
    """A list right below a line: for git's views it is one, for the site's markdown it is not."""
    with (small / "docs" / "page.md").open("a") as file:
        file.write("\nSuch as\n* one\n* two\n")
    assert build_site(small, tmp_path / "out", nav=NAV) == []
    assert misread_pages(small, tmp_path / "out") == ["docs/page.md: 2 li in a view of the repository, 0 in the site"]


def test_the_site_describes_every_public_name(site: Path) -> None:
    """With its signature, and no role of reStructuredText left in a text."""
    page = (site / "docs" / "api.html").read_text()
    for name, module in sla_megatron._HOME.items():
        assert f'id="sla_megatron.{module}.{name}"' in page, name
    assert not re.search(r":[a-z]+:(`|<code>)", page)


def test_words_are_found(site: Path) -> None:
    """What the search of the site looks into: a word of a page, its place, and no page that shows a source.

    In a folder of files, too, which has the same as a script, and no worker.
    """
    documents = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert any(
        "docs/slurm.html#resuming" == document["location"] and "incomplete_iter_" in document["text"]
        for document in documents
    )
    assert not [document for document in documents if ".py.html" in document["location"]]
    script = (site / "search" / "search_index.js").read_text()
    assert json.loads(script.removeprefix("var __index = "))["docs"] == documents
    assert '<script src="site/iframe-worker.js">' in (site / "docs" / "slurm.html").read_text()
    assert (site / "docs" / "site" / "iframe-worker.js").is_file()


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    """Neither fonts nor scripts nor pictures."""
    for page in site.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"?(https?:[^\">\s]+)", page.read_text())
        assert fetched == [], page


def test_a_small_site(small: Path, tmp_path: Path) -> None:
    """As it is, it has no fault; the script has a page, and the picture is there."""
    assert build_site(small, tmp_path / "out", nav=NAV) == []
    home = (tmp_path / "out" / "index.html").read_text()
    assert 'href="launch/run.sh.html"' in home and 'src="docs/picture.svg"' in home
    assert "echo" in (tmp_path / "out" / "launch" / "run.sh.html").read_text()
    assert (tmp_path / "out" / "docs" / "picture.svg").is_file()


@pytest.mark.parametrize(
    ("page", "text", "fault"),
    [
        ("docs/outside.md", "# Outside\n", 'not included in the "nav"'),
        ("docs/page.md", "# Page\n", "does not contain an anchor '#two-words'"),
        ("docs/page.md", "# Page\n\n## Two words\n\n[gone](gone.md)\n", "gone.md"),
        ("docs/api.md", "# Names\n\n::: sla_megatron.common.errors.NoError\n", "NoError"),
    ],
    ids=["page-outside-nav", "anchor", "link", "name"],
)
def test_a_broken_site_is_found(small: Path, tmp_path: Path, page: str, text: str, fault: str) -> None:
    (small / page).write_text(text)
    found = build_site(small, tmp_path / "out", nav=NAV)
    assert found and fault in " ".join(found), found
