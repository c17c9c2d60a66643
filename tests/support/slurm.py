"""A real Slurm on this machine, on loopback alone: munged, slurmctld and a slurmd for each of a few nodes.

Everything lives in one scratch folder and ends with the test.  Nothing is taken from, or written to, /etc/slurm.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .launch import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "srun")

_CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
KillWait=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_min_interval=0,bf_interval=1,sched_interval=1,requeue_delay=0
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports}] CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes={nodes} Default=YES MaxTime=INFINITE State=UP GraceTime=120 PriorityTier=1
PartitionName=urgent Nodes={nodes} MaxTime=INFINITE State=UP PreemptMode=OFF PriorityTier=9
"""


def missing() -> list[str]:
    """Which of Slurm's programs are not on this machine."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@dataclass
class Cluster:
    """A running cluster.  ``environment`` is what Slurm's commands need."""

    folder: Path
    nodes: list[str]
    environment: dict[str, str]
    daemons: list[subprocess.Popen] = field(default_factory=list)

    def command(self, *arguments: object, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Run one of Slurm's commands: what it prints."""
        done = subprocess.run(
            [str(a) for a in arguments],
            env=self.environment | environment,
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            raise RuntimeError(f"{arguments}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job."""
        words = self.command("scontrol", "-o", "show", "job", job, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, job: str, states: set[str], seconds: float = 300) -> dict[str, str]:
        """Wait for a job to be in one of ``states``; what is known of it then."""
        deadline = time.monotonic() + seconds
        while (known := self.job(job)).get("JobState") not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {known.get('JobState')} after {seconds} s\n{self.logs()}")
            time.sleep(0.1)
        return known

    def logs(self) -> str:
        texts = [f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted((self.folder / "log").glob("*"))]
        return "\n".join(texts)


def processes_with(command: bytes, **variables: str) -> list[int]:
    """Those that run the command and have the variables in their environment."""
    names = [f"{name}={value}\0".encode() for name, value in variables.items()]
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                environment = (folder / "environ").read_bytes()
                running = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if all(b"\0" + name in b"\0" + environment for name in names) and command in running:
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def cluster(folder: Path, size: int) -> Iterator[Cluster]:
    """A cluster of ``size`` nodes, node1 and so on, in ``folder``, for the length of the block."""
    for name in ("run", "log", "state", "spool"):
        (folder / name).mkdir(parents=True)
    first = _first_of(size)
    ports = f"{first}-{first + size - 1}" if size > 1 else str(first)
    nodes = f"node[1-{size}]"
    config = folder / "slurm.conf"
    values = {"folder": folder, "controller": free_ports(1)[0], "ports": ports, "nodes": nodes}
    config.write_text(_CONFIG.format(user=_user(), **values))
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    # What a job inherits from the shell that submits it must not speak of another job or rank.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        inherited.pop(name, None)
    environment = inherited | {"PATH": path, "SLURM_CONF": str(config)}
    made = Cluster(folder, [f"node{i + 1}" for i in range(size)], environment)
    try:
        _start(made)
        yield made
    finally:
        _stop(made)


def _first_of(count: int) -> int:
    """The first of ``count`` free ports in a row, as one line of the configuration wants them."""
    while True:
        first = free_ports(1)[0]
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _start(made: Cluster) -> None:
    folder = made.folder
    key = folder / "run" / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    munge = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munge.seed"}
    flags = [f"--{name}={folder}/run/{file}" for name, file in munge.items()]
    _daemon(made, "munged", "-F", "--force", f"--log-file={folder}/log/munged.log", *flags)
    _wait(lambda: (folder / "run" / "munge.sock").exists(), "munged", made)
    _daemon(made, "slurmctld", "-c", "-D", "-f", made.environment["SLURM_CONF"])
    _wait(lambda: "UP" in made.command("scontrol", "ping", check=False), "slurmctld", made)
    for node in made.nodes:
        _daemon(made, "slurmd", "-D", "-N", node, "-f", made.environment["SLURM_CONF"])
    _wait(lambda: made.command("sinfo", "-h", "-N", "-p", "debug", "-o", "%T").split() == ["idle"] * len(made.nodes),
          "slurmd", made)  # fmt: skip


def _daemon(made: Cluster, *command: str) -> None:
    log = (made.folder / "log" / f"{command[0]}-{len(made.daemons)}.out").open("wb")
    made.daemons.append(
        subprocess.Popen(command, env=made.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    )


def _wait(ready, what: str, made: Cluster, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in made.daemons):
            raise RuntimeError(f"{what} did not start\n{made.logs()}")
        time.sleep(0.05)


def _stop(made: Cluster) -> None:
    """Jobs first, munged last; only what was started here, by pid."""
    with contextlib.suppress(Exception):
        for job in made.command("squeue", "-h", "-o", "%i").split():
            made.command("scancel", "--full", "--signal=KILL", job, check=False)
            made.command("scancel", job, check=False)
        deadline = time.monotonic() + 15
        while made.command("squeue", "-h", "-o", "%i").split() and time.monotonic() < deadline:
            time.sleep(0.1)
    for daemon in reversed(made.daemons):
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
