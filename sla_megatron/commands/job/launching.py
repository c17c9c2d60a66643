"""A training as the words of one command: what each node runs, or with srun each rank."""

from __future__ import annotations

import os
import re
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from ...common.errors import FlagError
from ...common.flag_types import count
from .flags import JobError

LAUNCHERS = ("torchrun", "srun", "ft")

#: Our entry point, which knows all of Megatron's flags.
TRAINER = "sla_megatron.pretrain_gpt"
DOCTOR = "sla_megatron.commands.doctor.cli"

_FT = "nvidia_resiliency_ext.fault_tolerance.launcher"

#: ``torch.numa.binding.AffinityMode``.
_NUMA_MODES = ("node", "socket", "exclusive", "core-complex")

#: srun's ``--cpu-bind``, of its manual.
_CPU_BIND = re.compile(
    r"((quiet|verbose|q|v),)?(none|no|rank|(map_cpu|mask_cpu|map_ldom|mask_ldom):\S+|rank_ldom"
    r"|sockets|cores|threads|ldoms|boards)"
)

#: What runs a rank as a task of srun's: torch's variables from Slurm's, and files of its own for what it says, in each
#: step; a node's first and last rank, which Megatron has speak, are in the job's log as well.  A signal to the step
#: reaches the rank itself; what copies its words outlives it.
_RANK = """\
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$1
logs=$2${SLURM_STEP_ID:+/$SLURM_STEP_ID}/$SLURM_LOCALID
shift 2
mkdir -p "$logs" || exit
copy() { trap '' INT TERM HUP USR1 USR2; exec tee -a "$1"; }
if [ "$LOCAL_RANK" = 0 ] || [ "$LOCAL_RANK" = $((LOCAL_WORLD_SIZE - 1)) ]; then
    exec > >(copy "$logs/stdout.log") 2> >(copy "$logs/stderr.log" >&2)
else
    exec >>"$logs/stdout.log" 2>>"$logs/stderr.log"
fi
exec "$@"
"""


def add_launch(command: ArgumentParser) -> None:
    """What is launched, and how; without a value is as if it were not given."""
    command.add_argument("--launch", default="torchrun", metavar="HOW", help="torchrun, srun or ft (default: torchrun)")
    command.add_argument("--script", default="", metavar="FILE", help=f"train with it in place of {TRAINER}")
    command.add_argument("--module", default="", metavar="NAME", help="likewise, as python -m")
    command.add_argument("--bind", default="none", metavar="HOW", help="ranks to cores (default: none)")
    command.add_argument("--nodes", type=count("--nodes"), default=1, metavar="N", help="of the job (default: 1)")
    command.add_argument("--processes", type=count("--processes"), default=1, metavar="N", help="a node (default: 1)")
    command.add_argument("--python", default=sys.executable, metavar="FILE", help="the interpreter (default: this one)")


def check_launch(args: Namespace) -> None:
    """Refuse what cannot be launched.

    Raises:
        FlagError, JobError: naming the script's override, as its user gave it.
    """
    if args.launch not in LAUNCHERS:
        raise FlagError("LAUNCH", args.launch, ", ".join(LAUNCHERS[:-1]) + f" or {LAUNCHERS[-1]}")
    if args.script and args.module:
        raise JobError(f"SCRIPT={args.script} and MODULE={args.module}: expected one of them")
    _check_bind(args)
    if shown_elsewhere():
        return
    if args.launch == "ft" and find_module(_FT) is None:
        raise FlagError("LAUNCH", "ft", "nvidia-resiliency-ext where PYTHON finds it, which has ft_launcher")
    if args.script and not Path(args.script).is_file():
        raise FlagError("SCRIPT", args.script, "a Python file")
    if args.module and find_module(args.module) is None:
        raise FlagError("MODULE", args.module, "a module that python -m would find: its folder in PYTHONPATH")
    if args.bind != "none" and args.launch == "torchrun":
        if find_module("torch.numa.binding") is None:
            raise FlagError(
                "BIND", args.bind, "a torch whose torchrun has --numa-binding (2.9 or newer), or LAUNCH=srun"
            )
        if shutil.which("numactl") is None:
            raise FlagError("BIND", args.bind, "numactl, which torchrun calls for it, or LAUNCH=srun")


def shown_elsewhere() -> bool:
    """Whether the command of a container is only shown, outside of it: what it has cannot be looked at."""
    return os.environ.get("DRY_RUN") == "1" and bool(os.environ.get("CONTAINER_IMAGE"))


def _check_bind(args: Namespace) -> None:
    if args.bind == "none":
        return
    if args.launch == "srun":
        if not _CPU_BIND.fullmatch(args.bind):
            raise FlagError("BIND", args.bind, "what srun's --cpu-bind takes: cores, sockets, ldoms, map_ldom:0,0,1,1")
        return
    if args.launch == "ft":
        raise FlagError("BIND", args.bind, "none: ft_launcher binds no ranks")
    if args.bind not in _NUMA_MODES:
        raise FlagError("BIND", args.bind, f"what torchrun's --numa-binding takes: {', '.join(_NUMA_MODES)}")


def find_module(name: str) -> ModuleSpec | None:
    """Where ``python -m`` would find a module; nothing is imported on the way, which may take long."""
    path: Sequence[str] | None = None
    parts, found = name.split("."), None
    for size in range(1, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:size]), path)
        if found is None:
            return None
        path = found.submodule_search_locations or []
    return found


def environment(processes: int, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What ranks have in their environment, docs/slurm.md says why; what is ``given`` stays."""
    cores = given.get("SLURM_CPUS_PER_TASK", "")
    default = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "OMP_NUM_THREADS": str(max(int(cores) // processes, 1)) if cores.isdecimal() else "1",
    }
    # torchrun kills its processes so long after a signal: they are saving.
    always = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": given.get("SAVE_SECONDS") or "240"}
    return {name: given.get(name) or value for name, value in default.items()} | always


def launched(args: Namespace, program: Sequence[str], name: str) -> list[str]:
    """The words that start ``program`` (``-m``, a module; or a script) on all ranks, with its flags behind.

    ``%NODE%`` in them stands for the node's name.

    Args:
        args: of :func:`add_launch`, and ``address``, ``port``, ``id`` of job and attempt, and ``logs``, a folder.
        program: without its flags.
        name: the program's, for the folders of logs.
    """
    logs = f"{args.logs}/{name}-%NODE%"
    if args.launch == "srun":
        # Nobody would tell the others which one was free.
        port = args.port or 10_000 + int("0" + re.sub(r"\D", "", args.id)) % 20_000
        meeting = [f"MASTER_ADDR={args.address}", f"MASTER_PORT={port}"]
        return [*meeting, "bash", "-c", _RANK, "bash", str(args.processes), logs, args.python, "-u", *program]
    words = [args.python, "-m", "torch.distributed.run" if args.launch == "torchrun" else _FT]
    words += ["--nnodes", str(args.nodes), "--nproc-per-node", str(args.processes), "--max-restarts", "0"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{args.address}:{args.port}"]
    words += ["--rdzv-id", f"{args.id}.{name}", "--log-dir", logs]
    # Ranks log to files; a node's first and last one, which Megatron has speak, to the job's log as well.
    words += ["--redirects", "3", "--tee", f"0:3,{args.processes - 1}:3"]
    if args.launch == "ft":
        words += ["--term-timeout", os.environ.get("SAVE_SECONDS") or "240"]
    elif args.bind != "none":
        words += ["--numa-binding", args.bind]
    return [*words, *program]
