"""Runs a benchmark as its users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .launch import ROOT


def run_benchmark(name: str, out: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """What ``python -m benchmarks.NAME`` writes to ``out``, and what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *flags],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text()), done.stdout
