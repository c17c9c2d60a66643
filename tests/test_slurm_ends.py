"""Jobs of launch/slurm.sbatch that end, or go elsewhere, and their containers, on a real Slurm of three nodes.

What trains in them is a stand-in, if anything.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.support import containers
from tests.support.chain_runs import Run
from tests.support.launch import ROOT
from tests.support.slurm import Cluster, missing
from tests.support.slurm_jobs import FLAGS, TASK_FLAGS, Watch, crashes, log, shown, submit, wrapper

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(bool(missing()), reason="Slurm is not installed")]


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
    python = wrapper(tmp_path, crashes(tmp_path, 7))
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
    python = wrapper(tmp_path, crashes(tmp_path, 7))
    check = '[ "$SLURMD_NODENAME" != node1 ]'
    job = submit(slurm, run, *FLAGS, PYTHON=python, MAX_FAILURES="1", HEALTH_CHECK=check)
    slurm.until(job, {"FAILED"})
    assert "slurm.sbatch: excluding node1, and going on elsewhere" in log(run)
    assert set(re.findall(r"crashing on (\w+)", log(run))) == {"node2", "node3"}
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
