"""Runs a benchmark's module on ranks of this machine, which ``torchrun`` starts; the first of them answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sla_megatron.common.launchers import torchrun


def answer_of_ranks(module: str, ranks: int, flags: Sequence[str], environment: dict[str, str], label: str) -> Any:
    """What rank 0 writes, as JSON, to the file that ``--rank-answer`` names; all say what they have to into logs.

    Args:
        module: its name, with a flag ``--rank-answer``.
        ranks: how many.
        flags: more of the module's.
        environment: variables that count where there are none of the same name.
        label: what is said where it fails, which ends the program.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [*torchrun(ranks), "--log-dir", folder, "--redirects", "3"]
        command += ["-m", module, "--rank-answer", str(answer), *flags]
        done = subprocess.run(command, env=environment | os.environ)
        if done.returncode or not answer.exists():
            for log in sorted(Path(folder).rglob("stderr.log")):
                sys.stderr.write(log.read_text()[-3000:])
            sys.exit(f"{label}: the ranks ended with {done.returncode}")
        return json.loads(answer.read_text())
