"""``sla-doctor`` on real gloo ranks, each of which is told that it is a node of its own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from sla_megatron.commands.doctor import cli
from sla_megatron.commands.plan import cli as plan
from tests.support.indexed_files import write_indexed
from tests.support.launch import ROOT, free_ports, start_ranks
from tests.support.runs import argv

pytestmark = pytest.mark.distributed

LINES = ["ranks", "python", "torch", "megatron", "packages", "tools", "gpus", "upstream", "flags", "te", "apex"]
LINES += ["tokenizer", "data", "cache", "save", "space", "load"]
LINES += ["cores", "memory", "numa", "shm", "files", "memlock", "shared", "layout"]

#: The page's example: the job's flags, and what is done with them.
JOB, DOCTOR, PLAN = re.search(
    r'^JOB="(.*?)"\n(torchrun .*?)\n(sla-plan .*?)\n', (ROOT / "docs/pipeline.md").read_text(), re.MULTILINE | re.DOTALL
).groups()

#: Seconds in which a rank that hangs is found; all before it must be done in as many.
_TIMEOUT = 10


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs, in one pair of processes; each rank's answers, exit statuses and logs."""
    folder = tmp_path_factory.mktemp("doctor")
    data = write_indexed(folder / "data")

    def flags(name: str, *more: str, **changes: Any) -> dict[str, Any]:
        changes = {
            "mock_data": None,
            "data_path": data,
            "split": "8,1,1",
            "bad_nodes": folder / f"{name}.txt",
            **changes,
        }
        return {"argv": [*argv(**changes), *more]}

    checkpoints = {"save": folder / "to/be/made", "save_interval": 5}
    pipeline = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 1}
    further = {"mtp_num_layers": 1, "position_embedding_type": "rope", "untie_embeddings_and_output_weights": True}
    # Without what the shell does.
    documented = DOCTOR.partition(" -m sla_megatron.commands.doctor.cli ")[2].partition("|")[0].replace("$JOB", JOB)
    requests = {
        "documented": {"argv": documented.replace("\\\n", " ").split()},
        "tensor": flags("tensor", "--sla", **checkpoints),
        "interleaved": flags("interleaved", "--sla", num_layers_per_virtual_pipeline_stage=1, **pipeline, **further),
        "data": flags("data", "--sla", "--quick") | {"of_rank": {"1": ["--data-path", str(folder / "absent")]}},
        "flags": flags("flags", "--sla", "--sla-skip-distance", "0"),
        "hangs": flags("hangs", "--sla", timeout=_TIMEOUT, **pipeline) | {"hangs": 1},
    }
    for request, port in zip(requests.values(), free_ports(len(requests)), strict=True):
        request["port"] = port
    (folder / "request.json").write_text(json.dumps(requests, default=str))
    ranks = start_ranks(["-m", "tests.support.doctor_worker", str(folder)], 2, folder)
    statuses = [rank.wait(timeout=300) for rank in ranks]
    logs = [(folder / f"rank{rank}.log").read_text() for rank in range(2)]
    assert (folder / "answer0.json").exists(), logs
    answers = [json.loads((folder / f"answer{rank}.json").read_text()) for rank in range(2)]
    return {"folder": folder, "answers": answers, "statuses": statuses, "logs": logs}


def lines_of(ran: dict[str, Any], name: str, status: int) -> dict[str, tuple[str, str]]:
    """Rank 0's lines by check: status and text.  Rank 1 prints nothing and ends with the same status."""
    first, second = (answer[name] for answer in ran["answers"])
    assert (first["status"], second["status"]) == (status, status), (first, second)
    assert second["stdout"] == ""
    split = [line.split(maxsplit=2) for line in first["stdout"].splitlines()]
    return {check: (how, text) for how, check, text in split}


def bad_nodes(ran: dict[str, Any], name: str) -> list[str]:
    return (ran["folder"] / f"{name}.txt").read_text().splitlines()


def test_all_is_well_with_tensor_parallelism(ran: dict[str, Any]) -> None:
    """Every check has a line; what was written to try folders is gone again."""
    lines = lines_of(ran, "tensor", 0)
    assert list(lines) == LINES
    assert lines["ranks"] == ("ok", "2 on 2 nodes")
    # How much this machine has is not ours.
    machines = ("cores", "memory", "files", "memlock")
    assert {how for check, (how, _) in lines.items() if check not in machines} == {"ok", "skip"}
    skipped = ["gpus", "te", "apex", "load", "numa", "shm", "memlock"]
    # A machine may have a network adapter that pins memory.
    assert [check for check, (how, _) in lines.items() if how == "skip" or check == "memlock"] == skipped
    assert lines["cores"][1].endswith("for 1 rank") and "a process" in lines["files"][1]
    assert re.search(r"GB by .*; .* MB of 1 rank at start and .* kB of weights and optimizer and ", lines["memory"][1])
    assert lines["layout"][1].startswith("TP 2: loss ")
    assert bad_nodes(ran, "tensor") == []
    assert not (ran["folder"] / "to").exists()
    assert not list(ran["folder"].glob(".sla-doctor*"))


def test_all_is_well_with_virtual_stages(ran: dict[str, Any]) -> None:
    """K/V travel between the stages, as in the job; layers that predict further tokens are on the last."""
    lines = lines_of(ran, "interleaved", 0)
    assert lines["layout"][1].startswith("PP 2 x VPP 2: loss ")
    assert "world size 2: PP 2 x VPP 2; 4 layers" in lines["flags"][1]


def test_rates_are_measured_and_the_plan_takes_them(
    ran: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The page's commands: the last line that the ranks print is flags, with which a step is predicted."""
    first, second = (answer["documented"] for answer in ran["answers"])
    assert (first["status"], second["status"], second["stdout"]) == (0, 0, ""), first
    *lines, flags = first["stdout"].splitlines()
    assert re.fullmatch(r"--link-gb-per-s \S+ --link-latency-us \S+ (--link-half-duplex )?--compute-tflops \S+", flags)
    (line,) = [line for line in lines if line.startswith("ok    rates      ")]
    # Payloads are those of the plan: 64 hidden columns and K/V of 3 of 4 groups of 16 in two layers, of 64 positions.
    assert f"1 pair of neighbours: {4 * 64 * (64 + 2 * 2 * 3 * 16) / 1e6:.4g} MB in " in line
    assert PLAN == "sla-plan $JOB $(tail -n 1 doctor.txt)" and DOCTOR.endswith("| tee doctor.txt")
    monkeypatch.setattr(sys, "argv", ["sla-plan", *JOB.replace("\\\n", " ").split(), *flags.split()])
    monkeypatch.setenv("RANK", "0")
    plan.main()
    assert "Predicted step-time overhead: " in capsys.readouterr().out


def test_one_node_without_the_data(ran: dict[str, Any]) -> None:
    """The line names the node, and so does the file; --quick leaves the layout out."""
    lines = lines_of(ran, "data", 1)
    reason = f"{ran['folder']}/absent.idx cannot be read: No such file or directory"
    assert lines["data"] == ("FAIL", f"node node1: {reason}: expected PREFIX.bin and PREFIX.idx of the data")
    assert lines["layout"] == ("skip", "--quick")
    assert [check for check, (how, _) in lines.items() if how == "FAIL"] == ["data"]
    assert bad_nodes(ran, "data") == ["node1"]
    last = ran["answers"][0]["data"]["stderr"].splitlines()[-1]
    assert last == f"sla-doctor: error: first fault: data: {lines['data'][1]}"


def test_a_bad_flag_is_no_nodes_fault(ran: dict[str, Any]) -> None:
    """The flag, its value and what is accepted; the layout is not run."""
    lines = lines_of(ran, "flags", 1)
    expected = "--sla-skip-distance 0: expected one or more integers >= 1"
    assert lines["flags"] == ("FAIL", f"nodes node0, node1: {expected}")
    assert lines["layout"] == ("skip", "not run: a check before it failed")
    assert bad_nodes(ran, "flags") == []


def test_ranks_that_hang_are_named_and_ended(ran: dict[str, Any]) -> None:
    """Rank 0 waits for rank 1, which sleeps, in a collective; both end, although neither returns."""
    assert ran["statuses"] == [1, 1], ran["logs"]
    text = ran["logs"][0]
    expected = f"not finished within {_TIMEOUT} s: ranks 0-1 at building the model"
    assert f"FAIL  layout     {expected}" in text.splitlines(), text
    assert text.splitlines()[-1] == f"sla-doctor: error: first fault: layout: {expected}"


def test_the_folder_of_the_file_of_bad_nodes_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Said before anything is examined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sla-doctor", "--bad-nodes", str(tmp_path / "absent/bad.txt")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 2
    assert "--bad-nodes" in capsys.readouterr().err
