"""sla-job command: what launchers, shells and a user's own script are given."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from sla_megatron.commands.job import cli
from sla_megatron.commands.job.launching import find_module
from sla_megatron.commands.job.resources import lost_overrides, say_what_is_scarce
from sla_megatron.commands.job.script_flags import listed_flags

OWN = ["--save", "/c", "--load", "/c", "--exit-signal-handler"]
USER = ["--num-layers", "2", "--lr", "1e-3", "--title", "two words\n", os.fsdecode(b"no \xff text")]


def command(
    capsysbinary: pytest.CaptureFixture, run: Path, *options: str, flags: tuple[str, ...] = (*OWN, *USER)
) -> list[str]:
    """The words, as a shell reads them."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["command", "--run", str(run), "--own", "5", *options, "--", *flags])
    shown = capsysbinary.readouterr()
    assert ended.value.code == 0, shown.err
    *words, behind = os.fsdecode(shown.out).split("\0")
    assert behind == ""
    return words


def split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """What ``env`` sets, and the command behind."""
    assert words[0] == "env"
    count = next(number for number, word in enumerate(words[1:]) if "=" not in word)
    return dict(word.split("=", 1) for word in words[1 : count + 1]), words[count + 1 :]


PLACE = [
    "--nodes",
    "3",
    "--processes",
    "4",
    "--address",
    "10.0.0.1",
    "--port",
    "1234",
    "--id",
    "7.1",
    "--logs",
    "/logs",
]


def is_the_layout(parsed) -> None:
    """As the launcher itself reads its flags."""
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("3", "4", 0)
    assert (parsed.rdzv_backend, parsed.rdzv_endpoint) == ("c10d", "10.0.0.1:1234")
    assert parsed.log_dir == "/logs/sla_megatron.pretrain_gpt-%NODE%"
    assert (parsed.redirects, parsed.tee) == ("3", "0:3,3:3")
    assert (parsed.module, parsed.training_script) == (True, "sla_megatron.pretrain_gpt")
    assert parsed.training_script_args[-len(OWN + USER) :] == [*OWN, *USER]


def test_torchrun_reads_the_flags_as_they_are_meant(
    capsysbinary: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numactl").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SAVE_SECONDS", "77")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "18")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    variables, words = split(command(capsysbinary, tmp_path, *PLACE, "--bind", "node", "--python", "/py"))
    assert words[:3] == ["/py", "-m", "torch.distributed.run"]
    parsed = torchrun_parser().parse_args(words[3:])
    is_the_layout(parsed)
    assert parsed.numa_binding == "node"
    expected = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "77", "OMP_NUM_THREADS": "4", "NCCL_DEBUG": "INFO"}
    expected |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "SLA_RUN_FOLDER": str(tmp_path)}
    assert expected.items() <= variables.items()


@pytest.mark.skipif(
    importlib.util.find_spec("nvidia_resiliency_ext") is None, reason="needs nvidia-resiliency-ext, for its ft_launcher"
)
def test_ft_launcher_reads_the_flags_as_they_are_meant(capsysbinary: pytest.CaptureFixture, tmp_path: Path) -> None:
    from nvidia_resiliency_ext.fault_tolerance.launcher import get_args_parser

    _, words = split(command(capsysbinary, tmp_path, *PLACE, "--launch", "ft"))
    assert words[1:3] == ["-m", "nvidia_resiliency_ext.fault_tolerance.launcher"]
    parsed = get_args_parser().parse_args(words[3:])
    is_the_layout(parsed)
    assert parsed.term_timeout == 240


#: A rank that says what it is told, and waits for a signal.
RANK = """
import argparse, os, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--lr")
parser.add_argument("--exit-signal-handler", action="store_true")
given = parser.parse_args()
def told(*_):
    print("told", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, told)
names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
print("fault", file=sys.stderr)
print(*(os.environ[name] for name in names), *sys.argv[1:])
time.sleep(60)
"""


def test_tasks_of_srun_are_ranks(capsysbinary: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Of the second node: torch's variables, files of their own, first and last to the job's log as well; a signal
    to all processes of the step, as Slurm sends it, reaches the rank, and what it says then is not lost.
    """
    script = tmp_path / "train.py"
    script.write_text(RANK)
    options = [
        *PLACE,
        "--processes",
        "3",
        "--launch",
        "srun",
        "--script",
        str(script),
        "--logs",
        str(tmp_path / "logs"),
    ]
    # As sla-sweep gives it: any free one, which the others would not know of.
    free, _ = split(command(capsysbinary, tmp_path, *options, "--port", "0", flags=tuple(OWN)))
    assert 10_000 <= int(free["MASTER_PORT"]) < 30_000
    variables, words = split(command(capsysbinary, tmp_path, *options, flags=(*OWN, "--lr", "1")))
    started = {}
    for local in range(3):
        task = {"SLURM_PROCID": str(3 + local), "SLURM_NTASKS": "9", "SLURM_LOCALID": str(local), **variables}
        started[local] = subprocess.Popen(
            [word.replace("%NODE%", "node2") for word in words],
            env=os.environ | task,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    for local, process in started.items():
        folder = tmp_path / "logs" / "train-node2" / str(local)
        deadline = time.monotonic() + 20
        while not (folder / "stdout.log").exists() or not (folder / "stdout.log").read_text():
            assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=20)
        said = f"{3 + local} 9 {local} 3 10.0.0.1 1234 --exit-signal-handler --lr 1\ntold\n"
        assert process.returncode == 3
        assert ((folder / "stdout.log").read_text(), (folder / "stderr.log").read_text()) == (said, "fault\n")
        assert (out, err) == ((said, "fault\n") if local != 1 else ("", ""))


def test_an_own_script_is_asked_once_what_it_takes(
    capsysbinary: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, script = tmp_path / "run", tmp_path / "mine.py"
    run.mkdir()
    asked = f"open({str(tmp_path / 'asked')!r}, 'a').write('x')\nimport argparse\np = argparse.ArgumentParser()\n"
    script.write_text(asked + "p.add_argument('--save', help='unlike --load')\np.add_argument('--lr')\np.parse_args()")
    for _ in range(2):
        _, words = split(command(capsysbinary, run, "--script", str(script), flags=(*OWN, "--lr", "1")))
        assert words[words.index(str(script)) :] == [str(script), "--save", "/c", "--lr", "1"]
    # The user's own flags are his.
    _, words = split(command(capsysbinary, run, "--script", str(script), flags=(*OWN, "--load", "/mine")))
    assert words[words.index(str(script)) :] == [str(script), "--save", "/c", "--load", "/mine"]
    assert (tmp_path / "asked").read_text() == "x"
    script.write_text(asked + "p.add_argument('--load')\np.add_argument('--exit-signal-handler')\np.parse_args()")
    _, words = split(command(capsysbinary, run, "--script", str(script), flags=tuple(OWN)))
    assert words[words.index(str(script)) :] == [str(script), "--load", "/c", "--exit-signal-handler"]
    # The same file as a module; the file is what is remembered.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    _, words = split(command(capsysbinary, run, "--module", "mine", flags=tuple(OWN)))
    assert words[words.index("mine") - 1 :] == ["-m", "mine", "--load", "/c", "--exit-signal-handler"]
    assert (tmp_path / "asked").read_text() == "xx"


@pytest.mark.parametrize("fault", ["raise SystemExit('no GPU here')", "print('--save is not listed')"])
def test_a_script_that_does_not_say_is_taken_for_megatrons(
    fault: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    script = tmp_path / "mine.py"
    script.write_text(fault)
    to = tmp_path / "words"
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["command", "--run", str(tmp_path), "--own", "5", "--script", str(script), "--to", str(to), "--", *OWN]
        )
    assert ended.value.code == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sla-job: {script} --help lists no flags (status ")
    assert line.endswith("it is taken to know all of Megatron's")
    assert to.read_text().split("\0")[-len(OWN) - 1 : -1] == OWN
    assert not (tmp_path / "script-flags.json").exists()


def test_options_are_listed_and_prose_is_not() -> None:
    """As argparse and click print them."""
    text = """usage: train.py [-h] [--usage-alone]

options:
  -h, --help            show it
  --save SAVE, --save-to SAVE
                        unlike --prose, kept
  --lr=LR  --other
  --no-x / --x  a switch
                        --wrapped prose
"""
    assert listed_flags(text) == {"--help", "--save", "--save-to", "--lr", "--no-x", "--x"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--launch", "mpirun"], "LAUNCH mpirun: expected torchrun, srun or ft"),
        (["--script", "a.py", "--module", "b"], "SCRIPT=a.py and MODULE=b: expected one of them"),
        (["--script", "gone.py"], "SCRIPT gone.py: expected a Python file"),
        (["--module", "no.such"], "MODULE no.such: expected a module that python -m would find"),
        (["--launch", "srun", "--bind", "core"], "BIND core: expected what srun's --cpu-bind takes: cores"),
        (["--bind", "cores"], "BIND cores: expected what torchrun's --numa-binding takes: node, socket"),
        (["--bind", "node"], "BIND node: expected numactl, which torchrun calls for it"),
        (["--launch", "ft", "--bind", "node"], "BIND node: expected none: ft_launcher binds no ranks"),
        (["--launch", "ft"], "LAUNCH ft: expected nvidia-resiliency-ext"),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_is_written(
    options: list[str], says: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "nvrx" not in path])
    for name in ("check", "command"):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--run", str(tmp_path / "run"), *options, "--", *OWN])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"sla-job: error: {says}"), line
    assert list(tmp_path.iterdir()) == []


def test_a_module_is_found_without_running_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud" / "inner").mkdir(parents=True)
    (tmp_path / "loud" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "loud" / "train.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert find_module("loud.train").origin == str(tmp_path / "loud" / "train.py")
    assert find_module("loud.gone") is find_module("loud.train.gone") is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"SLURM_CPUS_ON_NODE": "7"}, ["Slurm gave 7 cores a node for 4 ranks, which want 8: --exclusive, or"]),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_MEM_PER_NODE": "2048"}, []),
        (
            {"SLURM_MEM_PER_NODE": "1023"},
            ["Slurm gave 1.0 GiB a node, whose part of the checkpoint of iteration 7 is 1.0"],
        ),
        (
            {"SLURM_CPUS_ON_NODE": "8", "SLURM_MEM_PER_CPU": "100"},
            ["Slurm gave 0.8 GiB a node, whose part of the check"],
        ),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_MEM_PER_CPU": "200"}, []),
        # All that there is.
        ({"SLURM_MEM_PER_NODE": "0"}, []),
        ({}, []),
    ],
)
def test_what_slurm_gave_too_little_of_is_said_by_number(
    given: dict, says: list[str], checkpoint_of_2_gib: Path
) -> None:
    said: list[str] = []
    say_what_is_scarce(checkpoint_of_2_gib, 2, 4, said.append, given)
    assert len(said) == len(says) and all(map(str.startswith, said, says)), said


@pytest.fixture(scope="module")
def checkpoint_of_2_gib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .test_job import checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    # No blocks of it are on the disk.
    os.truncate(checkpoint(folder, 7) / "__0_0.distcp", 2 << 30)
    return folder


@pytest.mark.parametrize(
    ("exported", "named"),
    [
        ("ALL", None),
        ("ALL,NPROC=2", None),
        ("NONE", {"PRESETS", "SCRIPT", "SETUP"}),
        ("HOME,PRESETS,SCRIPT=x", {"SETUP", "LAUNCH"}),
    ],
)
def test_overrides_that_export_dropped(exported: str, named: set[str] | None) -> None:
    line = lost_overrides(exported, {"RUN_DIR": "x"})
    assert (line is None) == (named is None)
    if line is not None:
        lost = set(line.split("was lost: ")[1].split(";")[0].split())
        assert named <= lost and not {"RUN_DIR", "HOME"} & lost and ("PRESETS" in lost) == ("PRESETS" in named)
