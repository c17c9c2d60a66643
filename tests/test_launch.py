"""The launchers: presets as their files say, arguments as they were given, and the command they run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT

#: What a shell, an unquoted expansion or a sloppy printout would change.
AWKWARD = ["a b", "it's", '"quoted"', "$HOME", "*", "", "back\\slash", "two\nlines", "ends in a line\n", "#", "--x=a b"]

#: A Python that prints how it was called, in place of training.
FAKE_PYTHON = """#!{python}
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ["PYTHONPATH"], os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]]))
"""


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """In a folder whose name has a space."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    python = folder / "python"
    python.write_text(FAKE_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return python


def sh(*command: str | Path, **environment: str | Path) -> subprocess.CompletedProcess:
    """Run ``command`` with ``environment`` and none of the caller's overrides."""
    overrides = ("PRESETS", "NPROC", "PYTHON", "DRY_RUN", "PYTHONPATH", "CUDA_DEVICE_MAX_CONNECTIONS")
    inherited = {name: value for name, value in os.environ.items() if name not in overrides}
    return subprocess.run(
        [*map(str, command)],
        env=inherited | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def local(*arguments: str, **environment: str | Path) -> subprocess.CompletedProcess:
    """``launch/local.sh``."""
    return sh(ROOT / "launch" / "local.sh", *arguments, **environment)


def started_with(done: subprocess.CompletedProcess) -> list[str]:
    """The arguments with which the fake Python was started for two processes, behind the launcher's own."""
    assert done.returncode == 0, done.stderr
    argv, pythonpath, connections = json.loads(done.stdout)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 -m sla_megatron.pretrain_gpt".split()
    assert argv[: len(launcher)] == launcher
    assert (pythonpath, connections) == (str(ROOT), "1")
    return argv[len(launcher) :]


def arguments_of(presets: str, shell: str = "sh", folder: Path = ROOT) -> subprocess.CompletedProcess:
    """What ``with_presets`` hands on, as JSON, in a shell as strict as it can be."""
    script = f"""set -eu; cd "$1"; root={ROOT}; . "$root/launch/flags.sh"
    show() {{ '{sys.executable}' -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"; }}
    with_presets "$2" show last"""
    return sh(shell, "-c", script, shell, folder, presets)


def test_command_is_presets_then_arguments(fake_python: Path) -> None:
    """Presets in the order of their names, and the arguments last, so that they win."""
    found = started_with(local("--lr", "1", PRESETS="4k sla-pruned", PYTHON=fake_python, NPROC="2"))
    context = "--seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 2 --global-batch-size 128"
    assert found == [*context.split(), "--sla", "--sla-kv-projection", "pruned", "--lr", "1"]


def test_without_presets_arguments_alone(fake_python: Path) -> None:
    """As they are, whatever is in them."""
    assert started_with(local(*AWKWARD, PYTHON=fake_python, NPROC="2")) == AWKWARD


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_dry_run_prints_what_would_run(fake_python: Path, shell: str) -> None:
    """A shell that reads what is printed runs the same command, and nothing has run before."""
    own = {"PRESETS": "gpt2-124m 4k sla", "PYTHON": fake_python, "NPROC": "2"}
    printed = local(*AWKWARD, DRY_RUN="1", **own)
    assert printed.returncode == 0, printed.stderr
    assert "    --num-layers 12 \\\n" in printed.stdout
    assert started_with(sh(shell, "-c", printed.stdout)) == started_with(local(*AWKWARD, **own))


def test_every_line_of_a_users_own_file(tmp_path: Path) -> None:
    """Values with spaces, comments, other presets; nothing is expanded, nothing is run."""
    (tmp_path / "mine.flags").write_text(
        "# a comment\n\n"
        "  @sla\n"
        "--sla-skip-distance 3  9 # two\n"
        "--data-path=/a folder/with $HOME and `touch here` # not a comment\n"
        "\t--split 99,1,0\n"
        "--spec * $(touch here)\n"
        "--no-line-end"
    )
    for name in ("./mine.flags", "mine.flags", str(tmp_path / "mine.flags")):
        done = arguments_of(f"1k {name}", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[8:] == [
            *("--sla", "--sla-skip-distance", "3", "9"),
            "--data-path=/a folder/with $HOME and `touch here` # not a comment",
            *("--split", "99,1,0", "--spec", "*", "$(touch", "here)", "--no-line-end", "last"),
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.flags"]


def test_bash_and_sh_read_the_same() -> None:
    """The launchers are written for one or the other."""
    presets = "13b 8k sla-pruned recompute"
    in_sh, in_bash = (arguments_of(presets, shell) for shell in ("sh", "bash"))
    assert (in_sh.returncode, in_sh.stdout) == (in_bash.returncode, in_bash.stdout) != (0, "[]\n")
    assert json.loads(in_sh.stdout)[-1] == "last"


@pytest.mark.parametrize(
    ("presets", "says"),
    [
        ("gpt2-124m 3k", "no preset 3k; there are 13b 16k 1b 1k"),
        ("4k *", "no preset *; there are "),
        ("./none.flags", "no preset ./none.flags: there is no such file"),
        ("none/", "no preset none/: there is no such file"),
        ("bad.flags", "bad.flags:2: expected --flag, @preset or # comment, not num-layers 3"),
        ("named.flags", "no preset gone; there are "),
        ("itself.flags", "preset itself.flags names itself"),
    ],
)
def test_bad_presets_end_in_one_line(tmp_path: Path, presets: str, says: str) -> None:
    """Which says what is wrong, with status 2, before anything is run."""
    (tmp_path / "bad.flags").write_text("--sla\nnum-layers 3\n")
    (tmp_path / "named.flags").write_text("--sla\n@gone\n")
    (tmp_path / "itself.flags").write_text("@itself.flags\n")
    for shell in ("sh", "bash"):
        done = arguments_of(presets, shell, folder=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("sla-megatron: error: PRESETS: ") and says in line, line
    assert local(PRESETS="nothing-like-it", PYTHON="false").returncode == 2


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    """Of any launcher."""
    scripts = sorted(path for kind in ("*.sh", "*.sbatch") for path in (ROOT / "launch").glob(kind))
    assert len(scripts) >= 4
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
