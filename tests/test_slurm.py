"""launch/slurm.sbatch on a real Slurm of three nodes on this machine: whatever happens, the result is the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sla_megatron.common.checkpoint_folders import newest_complete
from tests.support import containers
from tests.support.launch import ROOT, free_ports, rank_environment
from tests.support.runs import argv
from tests.support.slurm import Cluster, cluster, missing, processes_with
from tests.support.wandb_files import recorded
from tests.unit.commands.job.test_attend import Run

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(bool(missing()), reason="Slurm is not installed")]

ITERATIONS, SAVE_INTERVAL = 30, 5
FLAGS = [
    *argv(
        sla=True,
        sla_skip_distance=2,
        hidden_size=64,
        seq_length=64,
        max_position_embeddings=64,
        global_batch_size=16,
        train_iters=ITERATIONS,
        save_interval=SAVE_INTERVAL,
        pipeline_model_parallel_size=2,
        no_create_attention_mask_in_dataloader=True,
    ),
    *("--device", "cpu"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), 3) as made:
        (made.folder / "runs").mkdir()
        yield made


def submit(slurm: Cluster, run: Path, *flags: str, nodes: int = 2, **environment: str) -> str:
    """Submit the unmodified script: the job's number."""
    names = {"RUN_DIR": str(run), "PYTHON": sys.executable, "NPROC": "2"} | environment
    options = ["--parsable", f"--nodes={nodes}", "--job-name=gpt", f"--output={run}.log"]
    return slurm.command("sbatch", *options, "launch/slurm.sbatch", *flags, cwd=ROOT, **names).strip()


def shown(slurm: Cluster, run: Path) -> dict[str, Any]:
    """What ``sla-job show`` says of a run, where Slurm's commands are this cluster's."""
    command = [sys.executable, "-m", "sla_megatron.commands.job.cli", "show", "--run", run, "--json"]
    return json.loads(slurm.command(*command, cwd=ROOT, PYTHONPATH=str(ROOT)))


def log(run: Path) -> str:
    path = Path(f"{run}.log")
    return path.read_text() if path.exists() else ""


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


class Watch:
    """What a job's log says after something was done to it."""

    def __init__(self, slurm: Cluster, job: str, run: Path) -> None:
        self.slurm, self.job, self.run, self.seen = slurm, job, run, 0

    def until(self, pattern: str, seconds: float = 240) -> re.Match[str]:
        """Wait for ``pattern`` in what was logged since the last match, and return it."""
        deadline = time.monotonic() + seconds
        ended = False
        while (found := re.compile(pattern).search(log(self.run), self.seen)) is None:
            late = time.monotonic() > deadline
            assert not (late or ended), f"no {pattern!r} in\n{log(self.run)[self.seen :][-6000:]}"
            # What it wrote before it ended is read once more.
            ended = self.slurm.job(self.job).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED")
            time.sleep(0.1)
        self.seen = found.end()
        return found

    def training(self) -> int:
        """Wait for the next iteration of a new attempt that is not its first."""
        self.until(r"sla-job: attempt \d+ of this run")
        first = int(self.until(r"iteration +(\d+)/ *\d+ .*lm loss")[1])
        return int(self.until(rf"iteration +({first + 1})/ *\d+ .*lm loss")[1])


def processes_on(node: str, run: Path, command: bytes) -> list[int]:
    """Those that run the command on the node, by what Slurm and :func:`submit` put into their environment."""
    return processes_with(command, SLURMD_NODENAME=node, RUN_DIR=str(run))


def test_whatever_happens_the_result_is_the_same(slurm: Cluster, undisturbed: Path) -> None:
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


#: Enough iterations for what is done to the tasks meanwhile; nothing is saved but when a signal comes, and at the end.
TASK_ITERATIONS = 250
TASK_FLAGS = [
    *argv(train_iters=TASK_ITERATIONS, save_interval=1000, lr_decay_iters=900, tensor_model_parallel_size=1),
    *("--eval-iters", "0", "--device", "cpu"),
]


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


def wrapper(folder: Path, training: str) -> str:
    """An interpreter that runs ``training``, a shell's line, in the place of torchrun."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/bash\n[[ "$*" != *torch.distributed.run* ]] || {{ {training}; }}\nexec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_step_that_resumed_from_a_damaged_checkpoint_is_ended(slurm: Cluster, tmp_path: Path) -> None:
    """One bit of a weight: torch would load it.  The chain goes on, in the same allocation, from the one before."""
    run = Run(slurm.folder / "runs" / "damaged")
    run.save(10, 20)
    run.flip(20)
    python = wrapper(tmp_path, "echo training; sleep 60")
    job = submit(slurm, run.folder, *FLAGS, PYTHON=python, HEALTH_CHECK="true")
    watch = Watch(slurm, job, run.folder)
    watch.until("resuming from iteration 20")
    watch.until("iter_0000020 is damaged: __0_0.distcp: weight: its bytes are not those that were written")
    watch.until("iter_0000020 is damaged: .*; it is now damaged_iter_0000020_")
    watch.until("resuming from iteration 10")
    watch.until("iter_0000010 is whole and finite")
    assert slurm.job(job)["Restarts"] == "0"
    slurm.command("scancel", job)
    slurm.until(job, {"CANCELLED"})
    assert run.there() == ["10", "damaged_iter_0000020"]


def test_a_crash_loop_stops(slurm: Cluster, tmp_path: Path) -> None:
    run = slurm.folder / "runs" / "crashing"
    python = wrapper(tmp_path, "echo crashing; exit 7")
    job = submit(slurm, run, *FLAGS, PYTHON=python, MAX_FAILURES="2")
    known = slurm.until(job, {"COMPLETED", "FAILED"})
    assert (known["JobState"], known["ExitCode"]) == ("FAILED", "7:0"), log(run)
    assert log(run).count("sla-job: attempt 1 failed with status 7: nothing is saved, no more than it began with") == 1
    assert "sla-job: stopping: 2 attempts in a row failed without a new checkpoint" in log(run)
    assert shown(slurm, run)["state"] == "failed"
    # Submitted anew, it is tried again.
    job = submit(slurm, run, *FLAGS, PYTHON=python, MAX_FAILURES="1")
    slurm.until(job, {"FAILED"})
    assert "sla-job: attempt 3 of this run" in log(run)


def test_an_unhealthy_node_is_excluded(slurm: Cluster, tmp_path: Path) -> None:
    run = slurm.folder / "runs" / "unhealthy"
    python = wrapper(tmp_path, "echo trained on $SLURMD_NODENAME; exit 7")
    check = '[ "$SLURMD_NODENAME" != node1 ]'
    job = submit(slurm, run, *FLAGS, PYTHON=python, MAX_FAILURES="1", HEALTH_CHECK=check)
    slurm.until(job, {"FAILED"})
    assert "slurm.sbatch: excluding node1, and going on elsewhere" in log(run)
    assert set(re.findall(r"trained on (\w+)", log(run))) == {"node2", "node3"}
    # Of an array, the task alone that was there; the last one has the array's own number.
    check = '[ "$SLURM_ARRAY_TASK_ID" = 0 ] || [ "$SLURMD_NODENAME" = node3 ]'
    words = [f"PYTHON={wrapper(tmp_path, 'sleep 30')}", "NPROC=1", f"HEALTH_CHECK={check}", f"SLA_ROOT={ROOT}"]
    options = ["--parsable", "--array=0-1", "--exclusive", "--job-name=ill", f"--output={slurm.folder}/%A_%a.log"]
    job = slurm.command(
        "sbatch", *options, "--export=SOME", ROOT / "launch" / "slurm.sbatch", *words, *TASK_FLAGS
    ).strip()
    watch = Watch(slurm, f"{job}_1", slurm.folder / f"{job}_1")
    watch.until(r"slurm.sbatch: excluding node\d, and going on elsewhere")
    watch.until(rf"sla-job: attempt 1 of this run, job {job}_1 on node3")
    other = slurm.job(f"{job}_0")
    assert (other["JobState"], other["Restarts"], other["ExcNodeList"]) == ("RUNNING", "0", "(null)")
    assert "node3" not in slurm.job(f"{job}_1")["ExcNodeList"].split(",") != ["(null)"]
    slurm.command("scancel", job)
    # What fails everywhere is no node's fault.
    job = submit(slurm, run, *FLAGS, PYTHON=python, HEALTH_CHECK="false", MAX_EXCLUDED="1")
    assert slurm.until(job, {"FAILED"})["ExitCode"] == "1:0"
    assert "would be excluded too, which makes 2 nodes: expected at most 1" in log(run)


def test_a_cancelled_job_stays_cancelled(slurm: Cluster, tmp_path: Path) -> None:
    run = slurm.folder / "runs" / "cancelled"
    python = wrapper(tmp_path, "trap 'exit 1' TERM; echo training; sleep 100 & wait")
    job = submit(slurm, run, *FLAGS, PYTHON=python)
    Watch(slurm, job, run).until("training")
    # Another that would save to the same folder meanwhile.
    run.with_name("second").mkdir()
    more = {"CHECKPOINTS": str(run / "checkpoints"), "NPROC": "4"}
    second = submit(slurm, run.with_name("second"), *FLAGS, nodes=1, PYTHON=python, **more)
    assert slurm.until(second, {"COMPLETED", "FAILED"})["ExitCode"] == "2:0"
    assert f"slurm.sbatch: error: {run}/checkpoints: job {job} is training there: expected another RUN_DIR" in log(
        run.with_name("second")
    )
    found = shown(slurm, run)
    assert (found["state"], found["slurm"]["state"]) == ("starting", "RUNNING")
    slurm.command("scancel", job)
    slurm.until(job, {"CANCELLED"})
    time.sleep(2)
    assert shown(slurm, run)["state"] in ("stopped", "failed")
    assert slurm.job(job)["JobState"] == "CANCELLED" and "requeueing" not in log(run)


#: A training of the user's own, which knows nothing of Megatron.
TRAINS = """
import argparse, os
parser = argparse.ArgumentParser()
parser.add_argument("--save")
parser.add_argument("--device")
given, _ = parser.parse_known_args()
print("trained by rank", *(os.environ[name] for name in ("RANK", "PWD", "SITE", "PYTHONPATH")), flush=True)
"""


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_every_step_of_a_job_is_in_its_container(runtime: str, slurm: Cluster, tmp_path: Path) -> None:
    """All mounts absolute, one name for the image on each node; Python, and what it finds, are the container's."""
    record, here, site = tmp_path / "steps", tmp_path / "here", tmp_path / "site"
    for folder in (here / "data", here / "own", site, here / "disk", tmp_path / "bin"):
        folder.mkdir(parents=True)
    containers.install(tmp_path / "bin", record, shutil.which("srun", path=slurm.environment["PATH"]))
    (here / "own" / "train.py").write_text(TRAINS)
    (site / "setup.sh").write_text("export SITE=was-set-up PYTHONPATH=$PYTHONPATH:/of/the/site\n")
    words = [
        "NPROC=2",
        "LAUNCH=srun",
        "SCRIPT=own/train.py",
        f"SETUP={site}/setup.sh",
        "RUN_DIR=runs/a",
        "STAGE=disk/x",
    ]
    words += [f"SLA_ROOT={ROOT}", f"CONTAINER_RUNTIME={runtime}", "CONTAINER_IMAGE=/images/megatron", "MAX_FAILURES=1"]
    words += ["CONTAINER_MOUNTS=data:/data:ro,/usr", "CHECKPOINTS=runs/b/c", "BIND=cores"]
    options = ["--parsable", "--nodes=2", f"--output={here}/log"]
    path = f"{tmp_path}/bin:{slurm.environment['PATH']}"
    script = ROOT / "launch" / "slurm.sbatch"
    job = slurm.command("sbatch", *options, script, *words, "--device", "cpu", cwd=here, PATH=path).strip()
    slurm.until(job, {"COMPLETED", "FAILED"})
    text = (here / "log").read_text()
    path = f"{ROOT}:/image/own:/of/the/site"
    assert set(re.findall(r"^\d: (trained by .*)", text, re.M)) == {
        f"trained by rank {rank} {here} was-set-up {path}" for rank in range(4)
    }, text
    steps = containers.recorded(record)
    for step in steps:
        mounts = (step["options"].get("--bind") or step["options"]["--container-mounts"]).split(",")
        own = [f"{folder}:{folder}" for folder in (ROOT, here, f"{site}/setup.sh")]
        assert mounts[:2] == [f"{here}/data:/data:ro", "/usr:/usr"] and set(own) <= set(mounts)
        # What there is by then.
        assert {f"{here}/own:{here}/own", f"{here}/disk:{here}/disk"} <= set(mounts)
        assert (step["options"].get("--pwd") or step["options"]["--container-workdir"]) == str(here)
    if runtime == "pyxis":
        names = {(step["options"]["--container-image"], step["options"]["--container-name"]) for step in steps}
        assert names == {("/images/megatron", f"sla-megatron-{job}")}
        assert [step["step"] for step in steps if step["step"] != "attend"] == (
            ["check", "health", "stage", "command", "train", "end"]
        )
    else:
        assert {step["options"]["image"] for step in steps} == {"/images/megatron"} and len(steps) >= 12


def test_bad_flags_end_the_job_before_anything_is_trained(slurm: Cluster) -> None:
    run = slurm.folder / "runs" / "bad"
    job = submit(slurm, run, *FLAGS, "--load", "elsewhere")
    assert slurm.until(job, {"COMPLETED", "FAILED"})["ExitCode"] == "2:0"
    assert "sla-job: error: --load elsewhere: expected the folder of --save" in log(run)
    job = submit(slurm, run, PRESETS="nothing")
    assert slurm.until(job, {"COMPLETED", "FAILED"})["ExitCode"] == "2:0"
    assert "sla-megatron: error: PRESETS: no preset nothing" in log(run)
    # Two processes on each of two nodes, of which Slurm has no GPU to give.
    for flags, more, says in (
        (
            ["--num-layers", "2"],
            {"NPROC": ""},
            "sla-job: error: --gpus-per-node: Slurm gave no GPU: expected GPUs",
        ),
        (
            [*FLAGS, "--context-parallel-size", "3"],
            {},
            "error: 4 ranks (2 x 2 processes) cannot hold TP 2 x PP 2 x CP 3",
        ),
        (
            [*FLAGS, "--ckpt-step", "5"],
            {},
            "sla-job: error: --ckpt-step 5 would go back to that iteration at each attempt",
        ),
    ):
        job = submit(slurm, run, *flags, **more)
        assert slurm.until(job, {"COMPLETED", "FAILED"})["ExitCode"] == "2:0"
        assert says in log(run)
    assert not run.exists()
    parts = ["--parsable", "-N1", f"--output={run}.log", ":", "-N1", "launch/slurm.sbatch", *FLAGS]
    job = slurm.command("sbatch", *parts, cwd=ROOT, PYTHON=sys.executable).strip()
    assert slurm.until(job, {"COMPLETED", "FAILED"})["ExitCode"] == "2:0"
    assert "slurm.sbatch: error: a heterogeneous job of 2 parts: expected one job of equal nodes" in log(run)
