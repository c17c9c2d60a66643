"""How ``sla-doctor``'s ranks hear of each other, and what rank 0 makes of it; in one process."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from sla_megatron.commands.doctor.examination import Lead, examine
from sla_megatron.commands.doctor.finding import FAIL, OK, SKIP, WARN, Fault, Finding, as_text, from_text
from sla_megatron.commands.doctor.meeting import Meeting, ranks_text
from sla_megatron.commands.doctor.node_checks import FLAGS, Asked, layout_may_run
from sla_megatron.commands.doctor.place import Place, slurm_nodes
from sla_megatron.commands.doctor.report import Line, Report, merge
from sla_megatron.commands.doctor.watch import Watch
from tests.support.launch import free_ports


def findings(check: str, **found: tuple[str, str]) -> dict[str, Finding]:
    """By node."""
    return {node: Finding(check, status, text) for node, (status, text) in found.items()}


@pytest.mark.parametrize(
    ("found", "expected", "bad"),
    [
        pytest.param(findings("data", a=(OK, "1 GB"), b=(OK, "1 GB")), (OK, "1 GB"), (), id="all-well"),
        pytest.param(findings("data", a=(FAIL, "gone")), (FAIL, "gone"), (), id="alone"),
        pytest.param(
            findings("data", a=(OK, "1 GB"), b=(FAIL, "gone"), c=(FAIL, "gone")),
            (FAIL, "nodes b, c: gone"),
            ("b", "c"),
            id="some-fail",
        ),
        pytest.param(
            findings("data", a=(FAIL, "gone"), b=(FAIL, "cut")), (FAIL, "node a: gone; node b: cut"), (), id="all-fail"
        ),
        pytest.param(
            findings("gpus", a=(FAIL, "none"), b=(FAIL, "none")), (FAIL, "nodes a, b: none"), ("a", "b"), id="no-gpus"
        ),
        pytest.param(
            findings("gpus", a=(OK, "8"), b=(SKIP, "no GPU")), (FAIL, "node b: no GPU"), ("b",), id="gpus-on-some"
        ),
        pytest.param(
            findings("torch", a=(OK, "2.15"), b=(OK, "2.15"), c=(OK, "2.14")),
            (FAIL, "node c: 2.14: expected the same on all nodes, as '2.15' on the 2 others"),
            ("c",),
            id="one-differs",
        ),
        pytest.param(
            findings("torch", a=(OK, "2.15"), b=(OK, "2.14")),
            (FAIL, "node b: 2.14: expected the same on all nodes, as '2.15' on the 1 other"),
            (),
            id="no-majority",
        ),
        pytest.param(findings("gpus", a=(OK, "8"), b=(WARN, "busy")), (WARN, "node b: busy"), (), id="a-doubt"),
        pytest.param(findings("cache", a=(OK, "there"), b=(SKIP, "not here")), (OK, "there"), (), id="one-node-alone"),
    ],
)
def test_findings_of_nodes_become_a_line(
    found: dict[str, Finding], expected: tuple[str, str], bad: tuple[str, ...]
) -> None:
    line = merge(found)
    assert (line.finding.status, line.finding.text) == expected
    assert line.bad_nodes == bad


def test_a_report_ends_with_its_first_fault(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = Report(io.StringIO())
    report.add(Line(Finding("torch", OK, "2.15")))
    report.add(Line(Finding("data", FAIL, "gone"), ("b", "c")))
    report.add(Line(Finding("save", FAIL, "full"), ("b",)))
    file = tmp_path / "bad.txt"
    assert report.conclude(str(file)) == 1
    assert file.read_text() == "b\nc\n"
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]
    assert report.stream.getvalue().splitlines()[:2] == ["ok    torch      2.15", "FAIL  data       gone"]
    assert capsys.readouterr().err == "sla-doctor: error: first fault: data: gone\n"
    assert Report(io.StringIO()).conclude(str(file)) == 0
    assert file.read_text() == ""


def test_files_and_folders_do_not_keep_the_layout_from_running() -> None:
    assert layout_may_run([Finding("data", FAIL, ""), Finding("gpus", SKIP, "")])
    assert not layout_may_run([Finding("flags", FAIL, "")])


def test_findings_go_through_a_store() -> None:
    given = [Finding("torch", OK, "2.15"), Finding("data", FAIL, "naïve: gone")]
    assert from_text(as_text(given)) == given


def test_what_ranks_leave_is_gathered_and_who_is_missing_said() -> None:
    store, said = HashStore(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sla_megatron.commands.doctor.meeting.PATIENCE", 0.05)
        for rank in (0, 2):
            Meeting(store, rank, 4).leave("come", f"node{rank}")
        answers = Meeting(store, 0, 4).gather("come", range(4), 0.3, said.append)
    assert answers == {0: "node0", 2: "node2"}
    assert said[0].startswith("waiting for ranks 1, 3: 0 of 0 s")
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([7, 3, 8, 9]) == "ranks 3, 7-9"


def test_what_rank_0_publishes_is_heard_or_missed() -> None:
    store = HashStore()
    Meeting(store, 0, 2).publish("verdict", 1)
    assert Meeting(store, 1, 2).await_("verdict", 1) == 1
    with pytest.raises(TimeoutError, match="rank 0 did not say 'probe'"):
        Meeting(store, 1, 2).await_("probe", 0.05)


def test_a_watch_ends_a_process_that_hangs() -> None:
    ended = threading.Event()
    watch = Watch(lambda: 1, grace=0.05, end=lambda status: ended.set())
    assert ended.wait(5)
    assert watch.finish() == 1


def test_a_watch_lets_a_process_end_that_does_not_hang() -> None:
    def conclude() -> int:
        time.sleep(0.05)
        return 0

    assert Watch(conclude, end=lambda status: pytest.fail("ended")).finish() == 0


def test_a_watch_that_hears_nothing_fails(capsys: pytest.CaptureFixture) -> None:
    def conclude() -> int:
        raise TimeoutError("rank 0 did not say 'verdict' within 3 s")

    assert Watch(conclude, end=lambda status: pytest.fail("ended")).finish() == 1
    assert "no conclusion was heard" in capsys.readouterr().err


def test_a_place_is_the_launchers_or_alone() -> None:
    torchrun = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert Place.of(torchrun | {"SLURMD_NODENAME": "gpu07"}) == Place(9, 16, 1, "gpu07", launched=True)
    srun = {name: value for name, value in torchrun.items() if name != "LOCAL_RANK"} | {"SLURM_LOCALID": "3"}
    assert Place.of(srun).local_rank == 3
    alone = Place.of({"RANK": "9", "WORLD_SIZE": "16"})
    assert (alone.rank, alone.world_size, alone.launched, alone.examines_node) == (0, 1, False, True)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a job of two ranks, of which this process is the only one."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    (port,) = free_ports(1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))


def test_ranks_that_do_not_come_are_named(
    two_ranks: None, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is imported or examined."""
    asked = Asked("cpu", None, False, 0.2, str(tmp_path / "bad.txt"))
    assert examine(asked, Place(0, 2, 0, "gpu01", launched=True)) == 1
    printed = capsys.readouterr()
    expected = "rank 1 of 2 did not come within 0 s: expected all ranks of the job; there are 1, on gpu01"
    assert printed.out == f"FAIL  ranks      {expected}\n"
    assert printed.err == f"sla-doctor: error: first fault: ranks: {expected}\n"
    assert (tmp_path / "bad.txt").read_text() == ""


def test_a_node_of_which_no_rank_comes_is_to_blame(
    two_ranks: None, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm says which nodes the job has."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\n[ $3 = 'gpu[01-02]' ] && printf 'gpu01\\ngpu02\\n'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[01-02]")
    asked = Asked("cpu", None, False, 0.2, str(tmp_path / "bad.txt"))
    assert examine(asked, Place(0, 2, 0, "gpu01", launched=True)) == 1
    assert "there are 1, on gpu01, none on gpu02\n" in capsys.readouterr().out
    assert (tmp_path / "bad.txt").read_text() == "gpu02\n"
    monkeypatch.setenv("SLURM_JOB_NODELIST", "other")
    assert slurm_nodes() == []
    assert slurm_nodes({}) == []


def test_two_ranks_on_one_gpu_are_odd() -> None:
    """Where no launcher says LOCAL_RANK, Megatron puts all of a node's ranks on its first GPU."""
    lead = Lead(Asked("cpu", None, True, 0.2, None), Place(0, 2, 0, "a", launched=True), Meeting(HashStore(), 0, 2))
    for rank in range(2):
        lead.meeting.store.set(f"come/{rank}", '["a", 0, "0-7"]')
    lead.report.stream = io.StringIO()
    assert lead._all_come()
    assert "2 ranks on node a have the LOCAL_RANK 0" in lead.report.stream.getvalue()


@pytest.mark.parametrize(
    ("rates", "silent", "lines"),
    [
        ((OK, "fast"), (), ["ok    layout     fine", "ok    rates      fast", "--compute-tflops 1"]),
        # The other waits in a collective, and is not to blame.
        ((FAIL, "no memory"), (1,), ["ok    layout     fine", "FAIL  rates      rank 0 on node a: no memory"]),
        ((OK, "fast"), (1,), ["FAIL  layout     not finished within 0 s: rank 1 at timing passes"]),
    ],
)
def test_rates_come_behind_the_layout(rates: tuple[str, str], silent: tuple[int, ...], lines: list[str]) -> None:
    """A line of figures, and where nothing failed the flags as they are."""
    lead = Lead(Asked("cpu", None, False, 0.1, None), Place(0, 2, 0, "a", launched=True), Meeting(HashStore(), 0, 2))
    lead.node_of, lead.report.stream = {0: "a", 1: "b"}, io.StringIO()
    found = [Finding("layout", OK, "fine"), Finding("rates", *rates), Finding(FLAGS, OK, "--compute-tflops 1")]
    for rank in range(2):
        lead.meeting.store.set(f"reached/{rank}", "timing passes")
        if rank not in silent:
            lead.meeting.store.set(f"layout-done/{rank}", json.dumps([rank, as_text(found)]))
    assert lead._conclude_layout(lead.meeting) == (1 if silent else 0)
    assert lead.report.stream.getvalue().splitlines() == lines


def test_rank_0_says_where_it_hangs_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On a file system that does not answer, say: a timer concludes."""
    bad, ended = tmp_path / "bad.txt", threading.Event()
    alone = Place(0, 1, 0, "a", launched=False)
    lead = Lead(Asked("cpu", None, True, 0.05, str(bad)), alone, Meeting(HashStore(), 0, 1), lambda status: ended.set())
    with lead._deadline():
        lead.doing = "data"
        assert ended.wait(5)
    assert capsys.readouterr().out == "FAIL  nodes      a is still at data after 0 s\n"
    assert bad.read_text() == "a\n"
    assert lead.meeting.await_("verdict", 1) == 1


def test_a_rank_that_finds_no_rank_0_says_so(two_ranks: None) -> None:
    with pytest.raises(Fault, match="rank 1 on node gpu02 cannot reach rank 0"):
        examine(Asked("cpu", None, False, 1.0, None), Place(1, 2, 0, "gpu02", launched=True))
