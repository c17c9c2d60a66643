"""Which flags a training script of the user's own takes: what its ``--help`` says, asked once and remembered."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from ...common.files import read_json, write_json
from .arguments import warn
from .launching import find_module, shown_elsewhere

#: How long it may take: Megatron's is there after some ten seconds, on a slow disk after more.
_SECONDS = 180

#: An option as argparse and others list it: near the line's beginning, its help further to the right or below.
_OPTION = re.compile(r"^ {1,8}(-\S.*)$", re.MULTILINE)
_FLAG = re.compile(r"(?<!\S)--[A-Za-z0-9][\w.-]*")


def takes(args: Namespace) -> Callable[[str], bool]:
    """Whether the script or module of ``args`` (see ``add_launch``) knows a flag; all, where it cannot be found out."""
    if shown_elsewhere():
        warn("the script's flags are not asked for outside of the container: all of the chain's are shown")
        return lambda flag: True
    flags = _remembered(args)
    return (lambda flag: True) if flags is None else flags.__contains__


def listed_flags(text: str) -> set[str]:
    """The flags that a help text lists as options; those that its prose mentions are none."""
    found: set[str] = set()
    for line in _OPTION.findall(text):
        # Behind two spaces its help begins.
        found |= {flag.rstrip(",") for flag in _FLAG.findall(re.split(r"\s{2,}", line)[0].replace("=", " "))}
    return found


def _remembered(args: Namespace) -> set[str] | None:
    path = Path(args.script).absolute() if args.script else _file_of(args.module)
    known = path.stat()
    source = {"path": str(path), "size": known.st_size, "time": known.st_mtime_ns}
    memory = args.run / "script-flags.json"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        stored = read_json(memory)
        if stored is not None and stored["source"] == source:
            return set(stored["flags"])
    flags = _asked([args.python, *program_of(args), "--help"])
    # A command that is shown alone writes nothing.
    if flags is not None and args.run.is_dir():
        write_json(memory, {"source": source, "flags": sorted(flags)})
    return flags


def program_of(args: Namespace) -> list[str]:
    """What the interpreter is given to run the user's own program."""
    return [str(Path(args.script).absolute())] if args.script else ["-m", args.module]


def _file_of(module: str) -> Path:
    found = find_module(module)
    if found is None or found.submodule_search_locations is not None:
        found = find_module(f"{module}.__main__")
    return Path(found.origin) if found and found.origin else Path(os.devnull)


def _asked(command: list[str]) -> set[str] | None:
    # A rank alone: some look at these before they look at their flags.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | alone
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL
        )
        reason = f"status {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        done, reason = None, str(error)
    flags = listed_flags(done.stdout) if done is not None and done.returncode == 0 else set()
    if not flags:
        warn(f"{' '.join(command[1:])} lists no flags ({reason}): it is taken to know all of Megatron's")
    return flags or None
