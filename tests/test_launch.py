"""The launchers: presets as their files say, arguments as they were given, and the command they run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT

#: What a shell, an unquoted expansion or a sloppy printout would change.
AWKWARD = ["a b", "it's", '"quoted"', "$HOME", "*", "", "back\\slash", "two\nlines", "ends in a line\n", "#", "--x=a b"]
# Layers of a hybrid model, which match names of files here.
AWKWARD += ["--hybrid-layer-pattern", "*-|M*E|-", "--hybrid-override-pattern=*", "--hybrid-layer-pattern=-*|*-"]

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
    overrides = ("PRESETS", "NPROC", "PYTHON", "DRY_RUN", "PYTHONPATH", "CUDA_DEVICE_MAX_CONNECTIONS", "RUN_DIR")
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


def test_own_programs_are_started_in_place_of_ours(fake_python: Path, tmp_path: Path) -> None:
    """On one machine as on Slurm, which tests/unit/commands/job/test_command.py is about."""
    (tmp_path / "my train.py").touch()
    own = {"PYTHON": fake_python, "NPROC": "2"}
    for given, expected in (
        ({"SCRIPT": tmp_path / "my train.py"}, [str(tmp_path / "my train.py")]),
        ({"MODULE": "my.train"}, ["-m", "my.train"]),
    ):
        done = local("--lr", "1", **own, **given)
        assert json.loads(done.stdout)[0][5:] == [*expected, "--lr", "1"], done.stderr
    for given in ({"SCRIPT": "gone.py"}, {"SCRIPT": tmp_path / "my train.py", "MODULE": "my.train"}):
        done = local("--lr", "1", **own, **given)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch("local.sh: error: SCRIPT .*: expected a file, or a module instead\n", done.stderr)


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
        "--hybrid-layer-pattern *-|*. # with files of such names here\n"
        "--hybrid-override-pattern=*\n"
        "--no-line-end"
    )
    for name in ("./mine.flags", "mine.flags", str(tmp_path / "mine.flags")):
        done = arguments_of(f"1k {name}", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[8:] == [
            *("--sla", "--sla-skip-distance", "3", "9"),
            "--data-path=/a folder/with $HOME and `touch here` # not a comment",
            *("--split", "99,1,0", "--spec", "*", "$(touch", "here)"),
            *("--hybrid-layer-pattern", "*-|*.", "--hybrid-override-pattern=*", "--no-line-end", "last"),
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.flags"]


def test_bash_and_sh_read_the_same() -> None:
    """The launchers are written for one or the other."""
    presets = "13b gpt2-124m-hybrid 8k sla-pruned cla2 recompute"
    in_sh, in_bash = (arguments_of(presets, shell) for shell in ("sh", "bash"))
    assert (in_sh.returncode, in_sh.stdout) == (in_bash.returncode, in_bash.stdout) != (0, "[]\n")
    assert json.loads(in_sh.stdout)[-1] == "last"


@pytest.mark.parametrize(
    ("presets", "says"),
    [
        ("gpt2-124m 3k", "no preset 3k; there are 13b 16k-cp2 16k 1b"),
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


def sbatch(*arguments: str, **environment: str | Path) -> subprocess.CompletedProcess:
    """``launch/slurm.sbatch``, which without Slurm shows its command."""
    return sh(ROOT / "launch" / "slurm.sbatch", *arguments, **{"DRY_RUN": "1", "PYTHON": sys.executable} | environment)


@pytest.mark.parametrize(
    ("presets", "flags", "processes", "whole"),
    [
        ("7b 4k", "", 2, False),
        ("7b 4k", "", 8, True),
        ("7b 4k", "", 6, False),
        ("7b 4k", "--tensor-model-parallel-size 1 --pipeline-model-parallel-size=2", 2, True),
        ("1b 4k", "--context-parallel-size 4", 6, False),
        ("1b 4k", "--tensor-model-parallel-size 8 --tensor-model-parallel-size=2", 2, True),
        ("1b 4k", "--tensor-model-parallel-size=2 --tensor-model-parallel-size 8", 2, False),
        ("1b 4k", "--expert-model-parallel-size 4 --num-experts 4", 2, False),
        ("1b 4k", "--expert-model-parallel-size 4 --expert-tensor-parallel-size 2 --num-experts 4", 4, False),
        ("1b 4k", "--expert-model-parallel-size 4 --num-experts 4", 4, True),
    ],
)
def test_layouts_that_ranks_cannot_hold(
    presets: str, flags: str, processes: int, whole: bool, fake_python: Path
) -> None:
    """Of both launchers: one line with the numbers, status 2, and nothing is printed to be run."""
    own = {"PRESETS": presets, "NPROC": str(processes), "DRY_RUN": "1"}
    for done in (local(*flags.split(), PYTHON=fake_python, **own), sbatch(*flags.split(), **own)):
        assert done.returncode == (0 if whole else 2), done.stderr
        assert bool(done.stdout) == whole
        if not whole:
            (line,) = done.stderr.splitlines()
            assert line.startswith(f"sla-megatron: error: {processes} ranks (1 x {processes} processes) cannot hold ")


@pytest.mark.parametrize("arguments", [[], ["--device", "auto"], ["--device=cpu", "--device", "cuda"]])
def test_a_node_without_gpus_is_no_secret(arguments: list[str], tmp_path: Path) -> None:
    """Of a command that is shown a line says so; where the CPU is meant, none."""
    python = tmp_path / "python"
    # It sees no GPU, whatever this machine has.
    python.write_text(f'#!/bin/sh\n[ "$1" != -c ] || {{ echo 0; exit; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for program in (local, sbatch):
        done = program("--num-layers", "2", *arguments, PYTHON=python, DRY_RUN="1")
        assert done.returncode == 0 and "--nproc-per-node 2" in done.stdout.replace("\\\n    ", "")
        assert re.fullmatch(r"(local.sh|sla-job): no GPU here: 2 processes .*\n", done.stderr), done.stderr
        meant = program("--num-layers", "2", "--device", "cpu", PYTHON=python, DRY_RUN="1")
        assert (meant.returncode, meant.stderr) == (0, "")
    refused = sbatch("--num-layers", "2", NPROC="two")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "slurm.sbatch: error: NPROC two: expected the number of processes a node\n"


@pytest.mark.parametrize(
    ("export", "lost", "kept"),
    [
        ("NONE", {"PRESETS", "RUN_DIR", "NPROC", "MAX_FAILURES"}, {"PYTHON"}),
        ("HOME,PRESETS,NPROC=2", {"RUN_DIR", "MAX_FAILURES"}, {"PYTHON", "PRESETS", "NPROC"}),
        (None, set(), None),
    ],
)
def test_overrides_that_sbatch_dropped_are_named(export: str | None, lost: set[str], kept: set[str] | None) -> None:
    """In one line, by what Slurm says of its --export in the job's environment."""
    given = {} if export is None else {"SLURM_EXPORT_ENV": export}
    done = sbatch("--num-layers", "2", "--device", "cpu", **given)
    assert done.returncode == 0
    said = re.findall(r"^sla-job: --export=(\S+): .* was lost: (.*); expected as words before", done.stderr, re.M)
    assert bool(said) == bool(lost)
    if said:
        assert said[0][0] == export
        named = set(said[0][1].split())
        assert lost <= named and not kept & named


def test_words_before_the_flags_are_overrides() -> None:
    """Of any name, with any value; the first flag ends them."""
    done = sbatch("PRESETS=4k sla", "NPROC=3", "NCCL_DEBUG=a b", "--lr", "X=1", "Y=2")
    assert done.returncode == 0, done.stderr
    assert "--nproc-per-node 3" in done.stdout
    flags = done.stdout[done.stdout.index("--exit-signal-handler") :]
    assert flags.split()[1:4] == ["\\", "--seq-length", "4096"]
    assert "PRESETS" not in flags and flags.rstrip().endswith("--lr X=1 Y=2")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["SETUP=gone.sh"], "slurm.sbatch: error: SETUP {here}/gone.sh: expected a shell file"),
        (["SETUP=bad.sh"], "sla-megatron: error: SETUP {here}/bad.sh: ended with status 3 on "),
        (
            ["CONTAINER_IMAGE=x", "CONTAINER_RUNTIME=docker"],
            "slurm.sbatch: error: CONTAINER_RUNTIME docker: expected py",
        ),
        (
            ["CONTAINER_IMAGE=x", "RUN_DIR=/gone/x"],
            "slurm.sbatch: error: RUN_DIR /gone/x: expected a folder in one that",
        ),
        (
            ["CONTAINER_IMAGE=x", "STAGE=a,b/c"],
            "slurm.sbatch: error: STAGE {here}/a,b/c: expected a path without a comma",
        ),
        (["LAUNCH=mpi"], "sla-job: error: LAUNCH mpi: expected torchrun, srun or ft"),
        (["SCRIPT=gone.py"], "sla-job: error: SCRIPT gone.py: expected a Python file"),
        (["KEEP=none"], "sla-job: error: --keep none: expected"),
    ],
)
def test_overrides_that_cannot_be_end_in_one_line(words: list[str], says: str, tmp_path: Path) -> None:
    """With status 2, before anything is written."""
    (tmp_path / "bad.sh").write_text("echo set up; return 3\n")
    (tmp_path / "a,b").mkdir()
    there = sorted(tmp_path.rglob("*"))
    program = f"cd {tmp_path} && exec {ROOT}/launch/slurm.sbatch"
    done = sh("bash", "-c", f'{program} "$@"', "bash", *words, "--device", "cpu", DRY_RUN="1", PYTHON=sys.executable)
    line = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (2, "") and line.startswith(says.format(here=tmp_path)), done.stderr
    assert sorted(tmp_path.rglob("*")) == there


def test_setup_comes_before_everything(tmp_path: Path) -> None:
    """Whatever it sets and prints; it does not see the flags."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "site-python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "there" / "site-python").chmod(0o755)
    (tmp_path / "setup.sh").write_text('export PATH=$PWD/there:$PATH NCCL_DEBUG="$# set up"; echo printed\n')
    program = f"cd {tmp_path} && exec {ROOT}/launch/slurm.sbatch SETUP=setup.sh --device cpu"
    done = sh("bash", "-c", program, DRY_RUN="1", PYTHON="site-python")
    assert done.returncode == 0, done.stderr
    assert "'NCCL_DEBUG=0 set up'" in done.stdout and "printed" not in done.stdout
    assert f"bash {ROOT} {tmp_path}/setup.sh env " in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    """Of any launcher."""
    scripts = sorted(path for kind in ("*.sh", "*.sbatch") for path in (ROOT / "launch").glob(kind))
    assert len(scripts) >= 4
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
