"""Launchers of ranks that a command has started.  Only the standard library is imported."""

from __future__ import annotations

import subprocess


def stop(launcher: subprocess.Popen) -> None:
    """End it, which ends its ranks; by force when it does not within 40 s (torchrun gives them 30)."""
    launcher.terminate()
    try:
        launcher.wait(40)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.wait()
