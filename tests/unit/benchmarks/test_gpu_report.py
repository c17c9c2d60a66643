"""The report for a GPU: which rows run, what is kept, listed and packed.  The rows are commands of a second or less."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import generation, loss, operations, throughput, transport
from benchmarks.gpu_report import rows as rows_of
from benchmarks.gpu_report.rows import Row
from benchmarks.record import ROOT
from benchmarks.training_steps import model_flags
from sla_megatron.common.presets import preset_flags

WRITES = """
import json, os, pathlib, sys, tempfile
folder = pathlib.Path(sys.argv[1])
result = {"at": tempfile.gettempdir(), "device": os.environ["SLA_TEST_DEVICE"]}
(folder / "some-gpu.json").write_text(json.dumps(result))
(folder / "weights.pt").write_bytes(b"0" * 1000)
print("the last line")
"""
FAILS = "import sys; print('beginning'); sys.exit('it is broken')"
#: Starts a helper in a session of its own, as launchers do, and hangs.
HANGS = """
import pathlib, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(pathlib.Path(sys.argv[1]) / "helper.txt").write_text(str(helper.pid))
print("hangs", flush=True)
time.sleep(600)
"""


def row(name: str, code: str, seconds: float = 1, gpus: int = 1) -> Row:
    return Row(name, ("-c", code, rows_of.FOLDER), seconds, gpus)


@pytest.fixture
def command() -> ModuleType:
    return importlib.import_module("benchmarks.gpu_report.__main__")


@pytest.fixture
def report(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, dict[str, dict[str, Any]], str]]:
    """A function from rows to exit status, what the report says of each row, and what was printed."""

    def run(*rows: Row, minutes: float = 1.0, gpus: int = 0, device: str = "cpu", only: str = "") -> Any:
        machine = {"device": "some", "processor": "a processor", "gpus": ["some"] * gpus, "commit": "abc", "torch": "2"}
        monkeypatch.setattr(command, "versions", lambda device: machine)
        flags = ["--out", str(tmp_path / "out"), "--minutes", str(minutes), "--device", device]
        status = command.main([*flags, *(["--rows", *only.split()] if only else [])], list(rows))
        found = json.loads((tmp_path / "out" / "report.json").read_text())
        assert found["machine"] == machine
        return status, {row["name"]: row for row in found["rows"]}, capsys.readouterr().out

    return run


def packed(tmp_path: Path) -> dict[str, bytes]:
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        return {member.name: archive.extractfile(member).read() for member in archive.getmembers()}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_is_done_fails_hangs_and_does_not_fit(report: Callable[..., Any], tmp_path: Path) -> None:
    """Each is listed with what it said, all of it is in one archive, and nothing but logs and results is."""
    begin = time.monotonic()
    rows = (row("good", WRITES), row("bad", FAILS), row("stuck", HANGS, seconds=0.7), row("long", WRITES, seconds=500))
    status, found, said = report(*rows, row("two", WRITES, gpus=2), row("short", WRITES))
    assert status == 1
    assert time.monotonic() - begin < 20
    assert {name: each["status"] for name, each in found.items()} == {
        **{"good": "done", "bad": "failed", "stuck": "cut", "long": "no time"},
        # On a processor any number of ranks can be started.
        **{"two": "done", "short": "done"},
    }
    assert (found["good"]["said"], found["bad"]["said"]) == ("some-gpu.json", "it is broken")
    assert found["stuck"]["said"].startswith("ended after 2 s, needs more: hangs")
    assert found["long"]["said"].startswith("not run: needs about 500 s, ")
    assert not is_running(int((tmp_path / "out" / "stuck" / "helper.txt").read_text()))
    for line in (r"  bad +failed +\d+  it is broken$", "  long +no time +not run: needs about 500 s", "all of it: "):
        assert re.search(f"^{line}", said, re.MULTILINE), line
    assert said.splitlines()[0].startswith("gpu-report: 1 minutes, 6 rows, into ")
    files = packed(tmp_path)
    assert set(files) == {
        *("out/report.json", "out/report.txt", "out/stuck/helper.txt"),
        *(f"out/{name}/log.txt" for name in ("good", "bad", "stuck", "two", "short")),
        *(f"out/{name}/some-gpu.json" for name in ("good", "two", "short")),
    }
    assert files["out/bad/log.txt"].decode().splitlines() == ["beginning", "it is broken"]
    assert json.loads(files["out/report.json"])["machine"]["torch"] == "2"
    # Temporary files were the report's own, in a place of a short name, and are gone.
    answer = json.loads(files["out/good/some-gpu.json"])
    own = Path(answer.pop("at"))
    assert own == tmp_path / "out" / "tmp" or own.name.startswith("sla-gpu-report-")
    assert (answer, own.exists()) == ({"device": "cpu"}, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tar.gz"]
    assert not (tmp_path / "out" / "tmp").exists()


def test_again_runs_what_is_not_done(report: Callable[..., Any], tmp_path: Path, command: ModuleType) -> None:
    """A row that is done is not touched, unless its command, the device or the sources are others."""
    counts = f"open({str(tmp_path / 'runs')!r}, 'a').write(sys.argv[0])"
    good, bad = row("good", f"import sys; {counts}; print('well')"), row("bad", f"import sys; {counts}; sys.exit(3)")

    def runs() -> int:
        return len((tmp_path / "runs").read_text()) // len("-c")

    assert report(good, bad)[0] == 1 and runs() == 2
    status, found, said = report(good, bad)
    assert (status, runs()) == (1, 3)
    assert "good: done before, kept" in said and found["good"]["said"] == "well"
    # Rows that are not asked for stay in the report.
    status, found, _ = report(good, bad, only="good")
    assert (status, runs()) == (0, 3) and set(found) == {"good", "bad"}
    report(row("good", f"import sys; {counts}; print('other')"), only="good")
    assert runs() == 4
    key = command.fingerprint(good.command, "some")
    assert key != command.fingerprint(good.command, "another")


def test_sources_are_what_is_measured(command: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.gpu_report import folder

    (tmp_path / "sla_megatron").mkdir()
    source = tmp_path / "sla_megatron" / "a.py"
    monkeypatch.setattr(folder, "ROOT", tmp_path)
    keys = []
    for text in ("a = 1", "a = 2", "a = 1"):
        source.write_text(text)
        folder._sources.cache_clear()
        keys.append(folder.fingerprint(["-c"], "some"))
    folder._sources.cache_clear()
    assert keys[0] == keys[2] != keys[1]


def test_one_gpu_does_not_do_for_two(report: Callable[..., Any]) -> None:
    status, found, said = report(row("one", WRITES), row("two", WRITES, gpus=2), gpus=1, device="cuda")
    assert status == 0
    assert (found["one"]["status"], found["two"]["status"]) == ("done", "too few GPUs")
    assert "two: not run: needs 2 GPUs" in said
    status, found, _ = report(row("one", WRITES), row("two", WRITES, gpus=2), gpus=2, device="cuda")
    assert found["two"]["status"] == "done"


def test_ended_from_outside(report: Callable[..., Any], tmp_path: Path, command: ModuleType) -> None:
    """What was running is ended, what was done is packed, and the next call goes on."""
    signals = "import os, pathlib, signal, sys, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    with pytest.raises(SystemExit) as ended:
        report(row("good", WRITES), row("signals", signals))
    assert ended.value.code == 128 + 15
    assert {"out/good/some-gpu.json", "out/report.json", "out/signals/log.txt"} <= set(packed(tmp_path))
    status, found, said = report(row("good", WRITES), row("signals", WRITES))
    assert status == 0 and found["signals"]["status"] == "done" and "good: done before" in said


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("out/mine.txt", "expected a new folder, an empty one or one of this command: mine.txt is not its"),
        ("out/report.json", "expected a new folder, an empty one or one of this command: report.json is not its"),
        ("out/good/mine.txt", "good is not its"),
        ("out", "expected a folder"),
        ("out.tar.gz", "expected a folder beside which there is no out.tar.gz"),
    ],
)
def test_what_is_somebody_elses_is_refused(
    report: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture, there: str, message: str
) -> None:
    """One line, before anything is written."""
    path = tmp_path / there
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        report(row("good", WRITES))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.gpu_report: error: --out {tmp_path / 'out'}: ") and line.endswith(message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_of_ones_own_in_a_row_is_refused(report: Callable[..., Any], tmp_path: Path) -> None:
    report(row("good", WRITES))
    (tmp_path / "out" / "good" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        report(row("good", WRITES))
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes 0: expected a number of minutes, more than 0"),
        (["--minutes", "soon"], "--minutes soon: expected a number of minutes, more than 0"),
        (["--device", "tpu"], "--device tpu: expected one of cuda, cpu"),
        (["--rows", "checks", "chekcs"], "--rows chekcs: expected some of checks, "),
    ],
)
def test_bad_flags(
    command: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "versions", lambda device: {})
    with pytest.raises(SystemExit) as ended:
        command.main(flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rows_are_commands_that_there_are() -> None:
    """The first is correctness; the five rows of throughput, and rows of 2, 4 and 8 GPUs are among them."""
    rows = rows_of.rows_for("cuda")
    assert rows[0].name == "checks" and len({row.name for row in rows}) == len(rows)
    assert {row.gpus for row in rows} == {1, 2, 4, 8}
    assert {row.name for row in rows if row.name.startswith("throughput-")} == {
        f"throughput-{what}" for what in ("124m-1k", "124m-4k", "124m-16k", "350m-4k", "1b-4k")
    }
    # The wanted minutes are enough for all of one GPU's.
    assert sum(row.seconds for row in rows if row.gpus == 1) <= 11 * 60
    for each in (*rows, *rows_of.rows_for("cpu")):
        if each.command[1] == "pytest":
            assert any((ROOT / word).is_file() for word in each.command), each.name
        else:
            assert (ROOT / f"{each.command[1].replace('.', '/')}.py").is_file(), each.name
            assert each.command[-2] == "--out" and each.command[-1].startswith(rows_of.FOLDER)


def test_the_benchmarks_take_the_flags_of_their_rows() -> None:
    """No GPU is needed to find that a row could not start: sizes that do not divide, a name that there is not."""
    checked = set()
    for each in (*rows_of.rows_for("cuda"), *rows_of.rows_for("cpu")):
        name, flags = each.command[1].removeprefix("benchmarks."), list(each.command[2:])
        if name == "throughput":
            throughput.check(throughput.make_parser(), throughput.make_parser().parse_args(flags))
        elif name == "transport":
            shapes = transport.shapes_of(transport._parser().parse_args(flags))
            assert {shape.ranks for shape in shapes} == {each.gpus} and len(shapes) >= 2
        elif name == "loss":
            args = loss.make_parser().parse_args(flags)
            assert args.model == loss.QUICKSTART or preset_flags(args.model)
        elif name in ("operations", "generation"):
            args = {"operations": operations, "generation": generation}[name].make_parser().parse_args(flags)
            assert name == "generation" or all(map(model_flags, args.models))
        else:
            continue
        checked.add(each.name)
    assert len(checked) >= 14


def test_sockets_fit_into_a_long_path(report: Callable[..., Any], tmp_path: Path, command: ModuleType) -> None:
    """Their folder is another then, and is gone at the end as well."""
    folder = importlib.import_module("benchmarks.gpu_report.folder").Folder(tmp_path / ("x" * 80))
    with folder.enter({}):
        folder.begin("some")
        assert len(str(folder.tmp)) < 80 and folder.tmp.is_dir()
    assert not folder.tmp.exists()


def test_it_speaks_before_it_imports_what_takes_seconds() -> None:
    heavy = {"torch", "megatron", "numpy", "matplotlib"}
    code = f"import sys, benchmarks.gpu_report.__main__; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_mark_is_found_in_processes_alone() -> None:
    from benchmarks.gpu_report import running

    assert list(running._marked("of nobody")) == []
    assert os.environ.get(running._MARK) is None and sys.platform == "linux"
