"""Starting ranks on this machine, and ending what was started.  Only the standard library is imported."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys

#: Linux's prctl: the signal that a process gets when the thread that started it ends.
_PR_SET_PDEATHSIG = 1


def torchrun(ranks: int) -> list[str]:
    """The words before ``-m MODULE`` that start it on ``ranks`` processes of this machine, with this Python."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def stop(launcher: subprocess.Popen) -> None:
    """End it, which ends its ranks; by force when it does not within 40 s (torchrun gives them 30)."""
    launcher.terminate()
    try:
        launcher.wait(40)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.wait()


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """From now on this process gets the signal when its parent ends, however that ends; nothing but on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
