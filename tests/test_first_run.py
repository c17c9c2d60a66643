"""The quickstart, shortened as CI shortens it: ``.ci/run`` runs it before the tests, and here it leaves its card."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.quickstart import workdir
from tests.support.cards import VARIABLE
from tests.support.launch import ROOT

SHORT = ["--device", "cpu", "--train-iters", "8", "--eval-iters", "2", "--corpus-mb", "2"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(VARIABLE not in os.environ, reason="no card is written, and .ci/run runs the quickstart itself")
def test_quickstart(tmp_path: Path, card: Callable) -> None:
    """Both models train to the end, with as many parameters; the export's logits are Megatron's, and it writes."""
    command = [sys.executable, "-m", "examples.quickstart.run", "--out", str(tmp_path / "out"), *SHORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    dense, sla = (workdir.load_result(tmp_path / "out", model) for model in workdir.MODELS)
    assert dense.iteration == sla.iteration == 8 and dense.parameters == sla.parameters
    # Less than guessing among 4096 tokens, 8.32 nats.
    assert dense.validation_loss != sla.validation_loss and max(dense.validation_loss, sla.validation_loss) < 8.2
    exported = re.search(r"logits equal; relative error (\S+), (?s:.*)goes on, greedily, with (.*)", done.stdout)
    assert exported and float(exported[1]) <= 1e-5, done.stdout
    results = {"validation loss after 8 steps, dense": dense.validation_loss, "skip-layer": sla.validation_loss}
    results |= {"parameters of each": sla.parameters, "export's logits, relative error": float(exported[1])}
    card("first-run", f"make quickstart QUICKSTART_ARGS={shlex.quote(shlex.join(SHORT))}", results)
