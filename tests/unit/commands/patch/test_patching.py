"""``sla-patch`` on small checkouts: what fits is applied and taken back exactly, what does not is left alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sla_megatron.commands.patch import checkout as checkouts
from sla_megatron.commands.patch import cli
from sla_megatron.commands.patch.checkout import PATCHES, Patch
from sla_megatron.commands.patch.diff import Diff, DiffError
from sla_megatron.upstream.flavours import FLAVOURS, MARKS, Flavour
from sla_megatron.upstream.megatron_version import CHECKED_WITH

FOLDER = Path(__file__).resolve().parents[4] / "patches"
LINES = [(patch, line) for patch in PATCHES for line in FLAVOURS if line.name in patch.flavours]
SCRIPTS = ["pretrain_gpt.py", "pretrain_hybrid.py"]
APPLIED, NOT_APPLIED, CANNOT = 0, 1, 2


@pytest.fixture(params=LINES, ids=[line.name for _, line in LINES])
def patch_and_version(request: pytest.FixtureRequest) -> tuple[Patch, str]:
    """A patch, and a version of a line of development that it is for, as that line says it."""
    patch, line = request.param
    return patch, f"{line.minor}.3"


@pytest.fixture
def checkout(tmp_path: Path, patch_and_version: tuple[Patch, str]) -> Path:
    """A checkout's files that matter; of each script the lines that the patch expects, between others."""
    patch, version = patch_and_version
    return make_checkout(tmp_path / "checkout", version, patch)


def make_checkout(folder: Path, version: str, patch: Patch) -> Path:
    major, minor, micro = version.split(".")
    core = folder / "megatron/core"
    for name, file in MARKS.items():
        (core / file).parent.mkdir(parents=True)
        (core / file).write_text(name if name in line_of(patch).marks else "")
    (core / "package_info.py").write_text(f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {micro}\n")
    for diff in patch.diffs:
        (folder / diff.path).write_text(script(diff))
    return folder


def line_of(patch: Patch) -> Flavour:
    """The first line of development that it is for."""
    return next(line for line in FLAVOURS if line.name == patch.flavours[0])


def script(diff: Diff) -> str:
    """What stands for upstream's script, with lines of its own between the hunks."""
    parts = (f"# before hunk {i}\n{hunk.before}# after hunk {i}\n" for i, hunk in enumerate(diff.hunks))
    return "# the first line\n" + "".join(parts) + "# the last line, without an end: é"


def scripts(folder: Path) -> list[Path]:
    return [folder / name for name in SCRIPTS]


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in scripts(folder)]


@pytest.fixture
def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """``sla-patch`` with these words: exit status, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sla-patch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


def assert_refused(outcome: tuple[int, str, str], *parts: str) -> None:
    status, out, err = outcome
    assert (status, out, err.count("\n")) == (CANNOT, "", 1)
    assert err.startswith("sla-patch: error: ")
    assert all(part in err for part in parts), err


# The patches.


def test_the_table_names_every_patch() -> None:
    """Each file is for some lines of development, and each that the project runs with has one patch."""
    assert sorted(path.name for path in FOLDER.glob("*.patch")) == sorted(patch.name for patch in PATCHES)
    assert sorted(line for patch in PATCHES for line in patch.flavours) == sorted(CHECKED_WITH)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_says_what_it_is_for(patch: Patch) -> None:
    """Its first lines name every version; it adds few lines, takes none away, and quotes few of upstream's."""
    text = (FOLDER / patch.name).read_text()
    header = text[: text.index("--- a/")]
    assert all(line in header for line in patch.flavours)
    assert [diff.path for diff in patch.diffs] == SCRIPTS
    for diff in patch.diffs:
        added = sum(len(hunk.after.splitlines()) - len(hunk.before.splitlines()) for hunk in diff.hunks)
        assert added <= 10
        assert sum(len(hunk.before.splitlines()) for hunk in diff.hunks) <= 3 * len(diff.hunks)
        # Or a hunk that is applied already would seem not to be.
        assert [hunk for hunk in diff.hunks if hunk.fits(hunk.after) or hunk.reversed().fits(hunk.before)] == []
    lines = text[text.index("@@ ") :].splitlines()
    assert not any(line.startswith("-") for line in lines if not line.startswith("--- a/"))


def test_the_readme_names_every_patch_and_version() -> None:
    """And every command."""
    text = (FOLDER / "README.md").read_text()
    words = [*(patch.name for patch in PATCHES), *CHECKED_WITH, "check", "apply", "revert", "registry"]
    assert [word for word in words if word not in text] == []


# Applied and taken back.


def test_apply_and_revert(checkout: Path, run: Callable) -> None:
    """Twice is once, and says so; what was there before comes back, byte for byte, with its permissions."""
    for path in scripts(checkout):
        path.chmod(0o640)
    before, files = contents(checkout), sorted(checkout.rglob("*"))
    assert run("check", checkout)[0] == NOT_APPLIED
    assert run("apply", checkout)[0] == 0
    applied = contents(checkout)
    assert all(b"enter_megatron_device()" in text for text in applied)
    assert all(len(after) > len(text) for after, text in zip(applied, before, strict=True))
    status, out, _ = run("apply", checkout)
    assert status == 0 and out.count("was applied already, nothing changed") == 2
    assert contents(checkout) == applied
    assert run("check", checkout)[0] == APPLIED
    assert run("revert", checkout)[0] == 0
    assert contents(checkout) == before
    status, out, _ = run("revert", checkout)
    assert status == 0 and out.count("was not applied, nothing changed") == 2
    assert contents(checkout) == before
    assert {path.stat().st_mode & 0o777 for path in scripts(checkout)} == {0o640}
    assert sorted(checkout.rglob("*")) == files


@pytest.mark.parametrize("half", SCRIPTS)
def test_what_is_half_applied(checkout: Path, patch_and_version: tuple[Patch, str], run: Callable, half: str) -> None:
    """As by an earlier version of this project, for one script: the other is applied, or the one is taken back."""
    before = contents(checkout)
    run("apply", checkout)
    applied = contents(checkout)
    for command, after in (("apply", applied), ("revert", before)):
        for path, old, new in zip(scripts(checkout), before, applied, strict=True):
            path.write_bytes(new if path.name == half else old)
        status, out, _ = run("check", checkout)
        assert status == NOT_APPLIED and (out.count("is applied"), out.count("fits, not applied")) == (1, 1)
        assert run(command, checkout)[0] == 0
        assert contents(checkout) == after


def test_every_answer_names_the_file_the_patch_and_the_version(
    checkout: Path, patch_and_version: tuple[Patch, str], run: Callable
) -> None:
    """On a line of stdout for each script."""
    patch, version = patch_and_version
    named = f"{version}, dev" if patch.flavours == ("dev",) else version
    for command in ("check", "apply", "apply", "check", "revert", "revert"):
        _, out, err = run(command, checkout)
        assert (out.count("\n"), err) == (2, "")
        for line, path in zip(out.splitlines(), scripts(checkout), strict=True):
            assert all(part in line for part in (str(path), patch.name, f"(Megatron {named})"))


def test_it_is_what_git_makes_of_the_patch(checkout: Path, patch_and_version: tuple[Patch, str], run: Callable) -> None:
    """The same bytes, and git takes back what sla-patch applied."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    patch, before = FOLDER / patch_and_version[0].name, contents(checkout)

    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=checkout, check=True, capture_output=True)

    git("init")
    git("apply", str(patch))
    by_git = contents(checkout)
    for path, text in zip(scripts(checkout), before, strict=True):
        path.write_bytes(text)
    run("apply", checkout)
    assert contents(checkout) == by_git
    git("apply", "--reverse", str(patch))
    assert contents(checkout) == before


def test_changes_elsewhere_in_the_file_are_kept(checkout: Path, run: Callable) -> None:
    """A user's own lines, made before or after applying, do not matter."""
    path = checkout / "pretrain_gpt.py"
    path.write_text("# mine\n" * 50 + path.read_text())
    run("apply", checkout)
    path.write_text(path.read_text().replace("# after hunk 0\n", "# mine too\n"))
    assert run("check", checkout)[0] == APPLIED
    assert run("revert", checkout)[0] == 0
    text = path.read_text()
    assert text.count("# mine\n") == 50 and "# mine too\n" in text
    assert "sla_megatron" not in text


def test_a_link_stays_a_link(checkout: Path, run: Callable) -> None:
    """The file that it points to is patched."""
    path, real = checkout / "pretrain_gpt.py", checkout / "elsewhere.py"
    path.rename(real)
    path.symlink_to(real)
    assert run("apply", checkout)[0] == 0
    assert path.is_symlink() and "sla_megatron" in real.read_text()


def test_a_relative_folder(checkout: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the current one."""
    monkeypatch.chdir(checkout)
    assert run("apply", ".")[0] == 0
    assert run("check", ".")[0] == APPLIED


# Refused.


@pytest.mark.parametrize("command", ["check", "apply", "revert"])
@pytest.mark.parametrize("version", ["0.17.1", "0.18.2", "0.21.0", "1.19.0"])
def test_an_unsupported_version_is_refused(tmp_path: Path, run: Callable, version: str, command: str) -> None:
    """Even where the lines would fit; the line names the version, where it stands, and those that are supported."""
    folder = make_checkout(tmp_path / "checkout", version, PATCHES[0])
    before = contents(folder)
    assert_refused(run(command, folder), f"{folder}/megatron/core/package_info.py: Megatron {version}", *CHECKED_WITH)
    assert contents(folder) == before


def test_a_version_that_cannot_be_read_is_refused(checkout: Path, run: Callable) -> None:
    """The line names the file."""
    path = checkout / "megatron/core/package_info.py"
    path.write_text("VERSION = 'mine'\n")
    assert_refused(run("apply", checkout), f"{path}: no version, expected MAJOR, MINOR and PATCH")


@pytest.mark.parametrize(
    "missing", [*SCRIPTS, "megatron/core/package_info.py", "megatron/core/transformer/attention.py"]
)
def test_what_is_no_checkout_is_refused(checkout: Path, run: Callable, missing: str) -> None:
    """The line names the file that is not there."""
    (checkout / missing).unlink()
    assert_refused(run("apply", checkout), f"{checkout / missing}: No such file", "Megatron-LM checkout")


HUNKS = [(patch, diff, i) for patch in PATCHES for diff in patch.diffs for i in range(len(diff.hunks))]


@pytest.mark.parametrize(
    ("patch", "diff", "hunk"), HUNKS, ids=[f"{patch.name}-{diff.path}-{i}" for patch, diff, i in HUNKS]
)
@pytest.mark.parametrize("damage", ["changed", "twice", "gone", "applied alone"])
def test_a_changed_place_is_refused(
    tmp_path: Path, run: Callable, patch: Patch, diff: Diff, hunk: int, damage: str
) -> None:
    """Whichever place it is, nothing is changed in any; the line quotes what was expected there."""
    chosen = diff.hunks[hunk]
    first, *middle, last = chosen.before.splitlines(keepends=True)
    put = {
        "changed": "".join([first, "# mine\n", *middle, last]),
        "twice": chosen.before + chosen.before,
        "gone": "",
        "applied alone": chosen.after,
    }
    text = script(diff).replace(f"hunk {hunk}\n{chosen.before}#", f"hunk {hunk}\n{put[damage]}#")
    assert text != script(diff)
    folder = make_checkout(tmp_path / "checkout", f"{line_of(patch).minor}.0", patch)
    (folder / diff.path).write_text(text)
    before = contents(folder)
    for command in ("check", "apply", "revert"):
        assert_refused(run(command, folder), f"{folder}/{diff.path}: changed where", repr(last.rstrip("\n")))
        assert contents(folder) == before


def test_windows_line_ends_are_refused(checkout: Path, run: Callable) -> None:
    """Rather than mixed with others."""
    path = checkout / "pretrain_gpt.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    before = path.read_bytes()
    assert_refused(run("apply", checkout), "changed where")
    assert path.read_bytes() == before


def test_what_is_not_text_is_refused(checkout: Path, run: Callable) -> None:
    """The line names the file."""
    (checkout / "pretrain_gpt.py").write_bytes(b"\xff\xfe")
    assert_refused(run("apply", checkout), "pretrain_gpt.py: not UTF-8")


@pytest.mark.parametrize("name", ["mkstemp", "replace"])
def test_a_failed_write_changes_nothing(
    checkout: Path, run: Callable, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The file is the old one, and nothing is left beside it."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before, files = contents(checkout), sorted(checkout.rglob("*"))
    monkeypatch.setattr(checkouts.tempfile if name == "mkstemp" else os, name, fail)
    assert_refused(run("apply", checkout), "pretrain_gpt.py: cannot be written (No space left on device)")
    assert contents(checkout) == before
    assert sorted(checkout.rglob("*")) == files


def test_missing_patches_are_named(checkout: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an installation lost them."""
    monkeypatch.setattr(checkouts, "PATCHES", (Patch("lost.patch", tuple(CHECKED_WITH)),))
    assert_refused(run("apply", checkout), "lost.patch is missing")


@pytest.mark.parametrize(
    "text", ["", "--- a/x\n+++ b/y\n@@ -1,1 +1,1 @@\n x\n", "--- a/x\n+++ b/x\n@@ -1,1 +1,2 @@\nx\n"]
)
def test_what_is_no_diff_of_files_raises(text: str) -> None:
    """A patch of ours that was damaged."""
    with pytest.raises(ValueError, match="not a"):
        Diff.parse(text)


def test_a_line_is_not_found_within_another() -> None:
    """Whole lines only."""
    (diff,) = Diff.parse("--- a/x\n+++ b/x\n@@ -1,2 +1,3 @@\n import torch\n+import mine\n \n")
    assert diff.apply("import torch\n\n") == "import torch\nimport mine\n\n"
    for text in (
        "    import torch\n\n",
        "import torch.nn\n\n",
        "import torch\nx\n",
        "import torch\n\nimport torch\n\n",
    ):
        with pytest.raises(DiffError, match="'import torch' then ''"):
            diff.apply(text)


# The registry.


def test_the_registry_is_printed(megatron_imported: None, run: Callable) -> None:
    """Every name, its reason, and what it was checked with."""
    from sla_megatron.commands.patch.registry import registry

    status, out, _ = run("registry")
    assert status == 0
    entries = registry()
    printed = set(re.findall(r"^  (?:or )?(\S+:\S+)", out, re.MULTILINE))
    assert printed == {target for entry in entries for target in entry.targets}
    assert all(f"      {form.reason}\n" in out for entry in entries for form in entry.forms)
    assert all(f"\n{entry.when}:\n" in out for entry in entries)
    assert all(checked in out for checked in CHECKED_WITH.values())
