"""launch/slurm.sbatch on a real Slurm of three nodes on this machine: whatever happens, the result is the same."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sla_megatron.common.checkpoint_folders import newest_complete
from tests.support.launch import ROOT, free_ports, rank_environment
from tests.support.slurm import Cluster, missing, processes_with
from tests.support.slurm_jobs import (
    FLAGS,
    ITERATIONS,
    SAVE_INTERVAL,
    TASK_FLAGS,
    TASK_ITERATIONS,
    Watch,
    log,
    shown,
    submit,
)
from tests.support.wandb_files import recorded

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(bool(missing()), reason="Slurm is not installed")]


def losses(text: str) -> dict[int, str]:
    """The loss that each iteration printed, as it was printed; the last time counts.

    The second of an attempt is left out: Megatron prints its mean with the first.
    """
    found = {}
    for attempt in text.split("> finished creating GPT datasets"):
        printed = re.findall(r"iteration +(\d+)/ *\d+ .*lm loss: (\S+)", attempt)
        found |= {int(iteration): loss for iteration, loss in printed[:1] + printed[2:]}
    return found


def weights(checkpoints: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, optimizer state included."""
    folder = checkpoints / f"iter_{ITERATIONS:07d}"
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    load(state, checkpoint_id=folder, no_dist=True)
    return state


def same_result(run: Path, undisturbed: Path) -> None:
    """Bit for bit: the losses as they were printed, and every tensor of the last checkpoint."""
    ours, expected = losses(log(run)), losses(log(undisturbed))
    both = ours.keys() & expected.keys()
    assert ITERATIONS in both and {i: ours[i] for i in both} == {i: expected[i] for i in both}
    ours, expected = weights(run / "checkpoints"), weights(undisturbed / "checkpoints")
    assert ours.keys() == expected.keys() and len(ours) > 20
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster) -> Path:
    """The run of a job that nothing happens to."""
    run = slurm.folder / "runs" / "undisturbed"
    job = submit(slurm, run, *FLAGS)
    assert slurm.until(job, {"COMPLETED", "FAILED"})["JobState"] == "COMPLETED", log(run)[-5000:]
    return run


def test_two_nodes_train_as_plain_torchrun_does(undisturbed: Path, tmp_path: Path) -> None:
    """TP=2 x PP=2 over two nodes: the losses of four processes that one torchrun starts."""
    text = log(undisturbed)
    assert "sla-job: first start: no checkpoint yet" in text
    assert f"sla-job: attempt 1 finished: iteration {ITERATIONS} is saved" in text
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--master-port", str(free_ports(1)[0]), "-m", "sla_megatron.pretrain_gpt"]
    flags = ["--train-iters", str(ITERATIONS // 3), "--lr-decay-iters", "20"]
    plain = subprocess.run(
        [*command, *FLAGS, *flags], cwd=ROOT, env=rank_environment(0, 1, 0), capture_output=True, text=True, timeout=300
    )
    assert plain.returncode == 0, plain.stderr[-3000:]
    expected = losses(plain.stdout)
    assert len(expected) == ITERATIONS // 3 - 1
    assert {i: losses(text)[i] for i in expected} == expected
    files = sorted(p.relative_to(undisturbed / "logs").parts for p in (undisturbed / "logs").rglob("stdout.log"))
    assert len(files) == 4 and {parts[1].rpartition("-")[2] for parts in files} == {"node1", "node2"}
    chain = json.loads((undisturbed / "chain.json").read_text())["attempts"]
    assert [(a["began_at"], a["ended_at"], a["how"]) for a in chain] == [(0, ITERATIONS, "finished")]


def processes_on(node: str, run: Path, command: bytes) -> list[int]:
    """Those that run the command on the node, by what Slurm and :func:`submit` put into their environment."""
    return processes_with(command, SLURMD_NODENAME=node, RUN_DIR=str(run))


def test_whatever_happens_the_result_is_the_same(slurm: Cluster, undisturbed: Path, card: Callable) -> None:
    """One job is told to leave, loses a node's processes, a node, its newest checkpoint, is preempted, and finishes."""
    run = slurm.folder / "runs" / "disturbed"
    job = submit(slurm, run, *FLAGS)
    watch = Watch(slurm, job, run)

    # The early signal, as Slurm sends it before the time limit.
    watch.training()
    slurm.command("scancel", "--batch", "--signal=USR1", job)
    watch.until(r"slurm.sbatch: USR1 came: the ranks save and exit \(step \d+\.\d+\)")
    saved = int(watch.until(r"sla-job: attempt 1 ended by a signal: iteration (\d+) is saved")[1])
    assert saved % SAVE_INTERVAL or saved >= 3
    watch.until(f"resuming from iteration {saved}")

    # One node's processes die in mid-step.
    iteration = watch.training()
    found = shown(slurm, run)
    assert (found["state"], found["slurm"]["state"]) == ("training", "RUNNING")
    assert found["checkpoint"]["iteration"] >= saved and found["iteration"] >= iteration
    assert found["train_iters"] == ITERATIONS and found["seconds_left"]["training"]
    victims = processes_on("node2", run, b"sla_megatron.pretrain_gpt")
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    saved = int(watch.until(r"sla-job: attempt 2 failed with status \d+: iteration (\d+) is saved")[1])
    # A helper would have no other that ends it: this Slurm does not use cgroups.
    assert not processes_on("node2", run, b"multiprocessing")
    watch.until(f"resuming from iteration {saved}")

    # A node goes down: Slurm itself requeues the job, without a word to it.
    watch.training()
    slurm.command("scontrol", "update", "nodename=node1", "state=down", "reason=test")
    # KillWait decides whether the ranks and the script end before they are killed.
    watch.until(
        "sla-job: attempt 3 ended (without a word: its node failed, or the job was killed|by a signal: iteration)"
    )
    # Unless it has come back by itself.
    slurm.command("scontrol", "update", "nodename=node1", "state=resume", check=False)

    # A job of a partition that preempts takes all nodes; meanwhile the newest checkpoint loses the end of a file.
    watch.training()
    # An older one to fall back to.
    watch.until("successfully saved checkpoint")
    nodes = ["--nodes=3", "--exclusive", "--partition=urgent", f"--output={slurm.folder}/urgent.log"]
    urgent = slurm.command("sbatch", "--parsable", *nodes, "--wrap=sleep 5").strip()
    # The fourth attempt as a rule: after the node went down, one was seen ended as it began, by a TERM of Slurm's own.
    preempted = watch.until(r"sla-job: attempt (\d+) ended by a signal: iteration (\d+) is saved")
    attempt, saved = int(preempted[1]), int(preempted[2])
    part = run / "checkpoints" / f"iter_{saved:07d}" / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-100])
    slurm.until(urgent, {"COMPLETED"})
    watch.until(f"the checkpoint of iteration {saved} is lost or damaged: falling back to iteration")
    watch.until(f"iter_{saved:07d} is not complete: __1_0.distcp ends at byte")
    resumed = int(watch.until(r"resuming from iteration (\d+)")[1])
    assert 0 < resumed < saved

    known = slurm.until(job, {"COMPLETED", "FAILED", "CANCELLED"})
    assert known["JobState"] == "COMPLETED", log(run)[-5000:]
    assert log(run).count(f"sla-job: attempt {attempt + 1} of this run") == 1
    assert len(list((run / "checkpoints").glob(f"incomplete_iter_{saved:07d}_*"))) == 1
    found = shown(slurm, run)
    assert (found["state"], found["slurm"]["state"], found["iteration"]) == ("finished", "GONE", ITERATIONS)
    # The node's torchrun died with its ranks, which srun says; if the other node's ends first, nobody does.
    killed = found["attempts"][1]
    assert re.match(r"Killed$|Signal 9 \(SIGKILL\)$|ended without a word: killed", killed["reason"]), killed
    assert killed["lost_iterations"] == killed["last_iteration"] - killed["ended_at"] >= 0
    same_result(run, undisturbed)
    results = {"loss of the last iteration, both jobs": float(losses(log(run))[ITERATIONS])}
    results |= {"requeues": int(known["Restarts"]), "attempts": [attempt["how"] for attempt in found["attempts"]]}
    results["iterations done again"] = sum(attempt["lost_iterations"] or 0 for attempt in found["attempts"])
    card("slurm-job", f"NPROC=2 sbatch --nodes=2 launch/slurm.sbatch {shlex.join(FLAGS)}", results)


def test_an_own_script_obeys_the_files_of_its_run(slurm: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """Started by srun alone, with a setup file: it saves when somebody says so and goes on with its nodes, is stopped,
    and goes on when it may; as one W&B run, with the newest checkpoints alone, and with the undisturbed run's result.
    """
    run = slurm.folder / "runs" / "own"
    (tmp_path / "site-python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "site-python").chmod(0o755)
    setup = tmp_path / "setup.sh"
    setup.write_text(f"export PATH={tmp_path}:$PATH SITE=$SLURMD_NODENAME WANDB_MODE=offline\n")
    own = {"SCRIPT": "examples/own_script/pretrain_my_gpt.py", "SETUP": str(setup), "PYTHON": "site-python"}
    flags = [*FLAGS[:-2], "--wandb-project", "site", "--wandb-exp-name", "own"]

    def start() -> tuple[str, Watch]:
        job = submit(slurm, run, *flags, LAUNCH="srun", KEEP="2", **own)
        return job, Watch(slurm, job, run)

    job, watch = start()
    watch.training()
    ranks = processes_with(b"pretrain_my_gpt.py", RUN_DIR=str(run), RANK="3", LOCAL_RANK="1", SITE="node2")
    assert ranks and not processes_with(b"torch.distributed.run", RUN_DIR=str(run))
    (run / "save").touch()
    watch.until(r"slurm.sbatch: word of sla-job attend came: the ranks save and exit \(step \d+\.\d+\)")
    saved = int(watch.until(r"sla-job: attempt 1 ended by a signal: iteration (\d+) is saved")[1])
    watch.until(f"resuming from iteration {saved}")
    assert slurm.job(job)["Restarts"] == "0"
    watch.training()
    (run / "stop").touch()
    stopped = int(watch.until(r"sla-job: attempt 2 .*stop.* iteration (\d+) is saved")[1])
    assert saved < stopped < ITERATIONS
    assert slurm.until(job, {"COMPLETED", "FAILED"})["JobState"] == "COMPLETED"

    job, watch = start()
    assert slurm.until(job, {"COMPLETED", "FAILED"})["ExitCode"] == "2:0"
    watch.until(f"sla-job: error: {run}/stop .* is there, nothing is trained")
    (run / "stop").unlink()
    job, watch = start()
    watch.until(f"resuming from iteration {stopped}")
    assert slurm.until(job, {"COMPLETED", "FAILED"})["JobState"] == "COMPLETED", log(run)[-5000:]
    same_result(run, undisturbed)
    assert newest_complete(run / "checkpoints")[0] == ITERATIONS
    assert len(list((run / "checkpoints").glob("iter_*"))) == 2
    attempts = recorded(run / "wandb")
    assert len(attempts) == 3 and len({name for name, _ in attempts}) == 1
    assert [min(steps) for _, steps in attempts] == [1, saved + 1, stopped + 1]


def test_each_task_of_an_array_is_told_crashes_and_goes_on_by_itself(slurm: Cluster) -> None:
    """With ``--export=NONE``: ranks have what the script sets, each task its folder, and Slurm's records are its own.

    The last task has the array's own number: by it Slurm's commands mean all three.
    """
    options = ["--parsable", "--array=0-2", "--export=NONE", "--job-name=gpt", f"--output={slurm.folder}/%A_%a.log"]
    # Folders are left to the script, which Slurm has a copy of: it asks where it was submitted from.
    words = [f"PYTHON={sys.executable}", "NPROC=1", "SAVE_SECONDS=77", "HEALTH_CHECK=true"]
    script = ROOT / "launch" / "slurm.sbatch"
    job = slurm.command("sbatch", *options, script, *words, *TASK_FLAGS, MAX_FAILURES="1").strip()
    tasks = [f"{job}_{number}" for number in range(3)]
    with ThreadPoolExecutor(len(tasks)) as pool:
        seen = dict(zip(tasks, pool.map(lambda task: disturb(slurm, task), tasks), strict=True))
    assert seen[tasks[2]].number == job
    assert len({one.number for one in seen.values()}) == len({one.endpoint for one in seen.values()}) == len(tasks)

    # Two are cancelled, and stay so; the one with the array's number comes to its end.
    ended = {task: slurm.until(task, {"COMPLETED", "FAILED", "CANCELLED"}) for task in tasks}
    assert [ended[task]["JobState"] for task in tasks] == ["CANCELLED", "CANCELLED", "COMPLETED"]
    for task, known in ended.items():
        text, run = log(slurm.folder / task), task_run(slurm, task)
        assert (known["Restarts"], known["ExcNodeList"]) == ("1", "(null)")
        # A first failure is gone on from where it was.
        seen_once = ("USR1 came", "requeueing job", "going on with the same nodes")
        assert [text.count(each) for each in seen_once] == [1, 1, 1]
        (lost,) = set(re.findall("--export=NONE: .* was lost:(.*); expected as words before the flags", text))
        assert {"PRESETS", "RUN_DIR", "MAX_FAILURES"} <= set(lost.split()) and "NPROC" not in lost
        chain = json.loads((run / "chain.json").read_text())["attempts"]
        assert {attempt["job"] for attempt in chain} == {task}
        assert [attempt["began_at"] for attempt in chain] == [0, seen[task].saved, seen[task].saved]
        assert [attempt["how"] for attempt in chain][0] == "preempted"
        assert newest_complete(run / "checkpoints")[0] == (TASK_ITERATIONS if task == tasks[2] else seen[task].saved)


class Seen(NamedTuple):
    """Of a task of an array: Slurm's number of it, where its ranks meet, and the iteration that it saved when told."""

    number: str
    endpoint: str
    saved: int


def task_run(slurm: Cluster, task: str) -> Path:
    """The run's folder that the script gives to a task of a job ``gpt``, where it is not told one."""
    return slurm.folder / "runs" / f"gpt-{task.partition('_')[2]}"


def disturb(slurm: Cluster, task: str) -> Seen:
    """Have a task told to leave, then its rank killed; it goes on from the same iteration, or is cancelled there."""
    watch, index = Watch(slurm, task, slurm.folder / task), task.partition("_")[2]
    watch.training()
    slurm.command("scancel", "--batch", "--signal=USR1", task)
    watch.until(rf"slurm.sbatch: USR1 came: the ranks save and exit \(step {task}\.\d+\)")
    saved = int(watch.until(r"sla-job: attempt 1 ended by a signal: iteration (\d+) is saved")[1])
    watch.until(f"slurm.sbatch: requeueing job {task}")
    watch.until(f"resuming from iteration {saved}")
    assert slurm.job(task)["Restarts"] == "1"

    watch.training()
    own = {"SLURM_JOB_ID": slurm.job(task)["JobId"], "SLURM_CONF": slurm.environment["SLURM_CONF"]}
    launcher = processes_with(b"--rdzv-endpoint", **own)[0]
    endpoint = re.search("--rdzv-endpoint\0(.+?)\0", Path(f"/proc/{launcher}/cmdline").read_text())[1]
    exported = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "77", "OMP_NUM_THREADS": "1"}
    ranks = processes_with(b"sla_megatron.pretrain_gpt", RANK="0", **own, **exported)
    assert ranks, task
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    watch.until(rf"sla-job: attempt 2 failed with status \d+: iteration {saved} is saved, no more than it began with")
    watch.until(rf"sla-job: attempt 3 of this run, job {task} on ")
    if index != "2":
        slurm.command("scancel", task)
    return Seen(own["SLURM_JOB_ID"], endpoint, saved)


def test_lost_checkpoints_are_not_replaced_by_random_weights(slurm: Cluster, undisturbed: Path) -> None:
    run = slurm.folder / "runs" / "lost"
    shutil.copytree(undisturbed, run)
    for folder in (run / "checkpoints").glob("iter_*"):
        shutil.rmtree(folder)
    job = submit(slurm, run, *FLAGS)
    assert slurm.until(job, {"COMPLETED", "FAILED"})["JobState"] == "FAILED"
    assert f"had a checkpoint of iteration {ITERATIONS} and has no complete one now (no iter_* folder)" in log(run)
    assert not losses(log(run))
