"""Starting ranks on this machine, and ending what was started.  Only the standard library is imported."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker

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


@contextlib.contextmanager
def starting_deaf(number: signal.Signals) -> Iterator[None]:
    """Processes that this thread starts within the block do not hear the signal.  Here it comes late, at its end."""
    # Its start lets signals through again, and multiprocessing would start it within the block.
    resource_tracker.ensure_running()
    # What is blocked here stays blocked in a process that is started meanwhile.
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """From now on this process gets the signal when its parent ends, however that ends; nothing but on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
