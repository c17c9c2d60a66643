"""The site's pages: those of the repository, each under its own path, and one for each source file that they link to.

A hook of mkdocs (``mkdocs.yml``), which by itself knows the files of one folder.  So a relative link leads to the same
place here as in a view of the repository, and nothing is copied by hand.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

#: Where pages are, relative to mkdocs.yml.
PAGES = ("*.md", "docs/*.md", "docs/*/*.md", "launch/*.md", "patches/*.md", "examples/*/*.md")

#: What the site needs beside pages and what these link to.
ASSETS = ("docs/site/*.css", "docs/site/*.js")

#: What a browser shows as it is.
SHOWN = {".svg", ".png", ".json"}

#: Suffix -> language, of what is shown as a page; text without one.
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".patch": "diff", ".toml": "toml"}

#: A link's or a picture's target in the repository, without its anchor.
_TARGET = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")

_CODE = re.compile("<code>[^<]*</code>")
_FLAG = re.compile(r"--[\w-]+")


def on_config(config: MkDocsConfig) -> None:
    """Has ``nav``'s patterns stand for the pages that fit, sorted, an index first."""
    config.nav = _expanded(config.nav, _root(config))


def _expanded(item: Any, root: Path) -> Any:
    if isinstance(item, dict):
        return {title: _expanded(inner, root) for title, inner in item.items()}
    if not isinstance(item, list):
        return item
    found = []
    for inner in item:
        if isinstance(inner, str) and "*" in inner:
            paths = sorted(root.glob(inner), key=lambda path: (path.name != "index.md", path))
            found += [path.relative_to(root).as_posix() for path in paths]
        elif (entry := _expanded(inner, root)) and not (isinstance(entry, dict) and [] in entry.values()):
            found.append(entry)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, the pages, and what they link to."""
    root = _root(config)
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    pages = [path for pattern in PAGES for path in sorted(root.glob(pattern))]
    assets = {path for pattern in ASSETS for path in root.glob(pattern)}
    sources = set()
    for page in pages:
        for target in _targets(page, root):
            (assets if target.suffix in SHOWN else sources).add(target)
    for path in [*pages, *sorted(assets)]:
        files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    for path in sorted(sources):
        name = path.relative_to(root).as_posix()
        content = _source_page(path, name)
        files.append(File.generated(config, f"{name}.md", content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to source files become links to their pages, those to a folder with a README to that."""
    folder = posixpath.dirname(page.file.src_uri)

    def named(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if files.get_file_from_path(f"{target}.md") is not None:
            return f"{match[1].rstrip('/')}.md"
        if files.get_file_from_path(f"{target}/README.md") is not None:
            return f"{match[1].rstrip('/')}/README.md"
        return match[0]

    return _TARGET.sub(named, markdown)


def on_page_content(html: str, **_: object) -> str:
    """In code within a line, a flag is not broken at its hyphens: ``site.css``."""
    return _CODE.sub(lambda code: _FLAG.sub(r'<span class="flag">\g<0></span>', code[0]), html)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def _targets(page: Path, root: Path) -> Iterator[Path]:
    """What there is of ``page``'s links in the repository, but for pages; a dead one is mkdocs' to find."""
    for match in _TARGET.finditer(page.read_text()):
        path = Path(posixpath.normpath(page.parent / match[1]))
        is_page = path.suffix == ".md" or (path / "README.md").is_file()
        if path.exists() and path.is_relative_to(root) and not is_page:
            yield path


def _source_page(path: Path, name: str) -> str:
    """Markdown that shows a file, or each file of a folder; searches do not look into it."""
    shown = [path] if path.is_file() else sorted(inner for inner in path.iterdir() if inner.is_file())
    hidden = "hide: [toc]\n" if path.is_file() else ""
    parts = [f"---\ntitle: {name}\nsearch:\n  exclude: true\n{hidden}---\n\n# {name}\n"]
    for file in shown:
        text = file.read_text()
        # Longer than any fence within.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        heading = "" if file == path else f"## {file.name}\n\n"
        parts.append(f"{heading}{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text}{fence}\n")
    return "\n".join(parts)
