"""``sla-job attend``: beside the training step, on one node."""

from __future__ import annotations

import os
import signal
from argparse import ArgumentParser, Namespace

from .arguments import CONTENTS, add_check, add_flags, add_keep, add_run, say
from .attendance import Attendance
from .flags import training_flags

HELP = "beside an attempt: look into new checkpoints, remove old ones, see RUN/stop; until SIGTERM"


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)
    add_flags(command)
    add_keep(command)
    add_check(command)
    own = "the training script knows nothing of RUN/save: end with status 20 when it is there"
    command.add_argument("--own-script", action="store_true", help=own)


class _Ended:
    """Whether SIGTERM came, which waits until it is asked for, or nobody is left who would send it."""

    def __init__(self) -> None:
        self._parent, self._over = os.getppid(), False

    def __call__(self) -> bool:
        self._over |= signal.SIGTERM in signal.sigpending() or os.getppid() != self._parent
        return self._over

    def wait(self, seconds: float = 0.5) -> None:
        self._over |= signal.sigtimedwait({signal.SIGTERM}, seconds) is not None


def run(args: Namespace) -> int:
    flags = training_flags(args.flags)
    if args.keep is not None:
        args.keep.agree(flags)
    # The ranks' work goes first; and numpy starts no threads for what needs none.
    os.nice(10)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    ended = _Ended()
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return Attendance(args.run, flags, args.keep, args.check == CONTENTS, args.own_script, say, ended).attend(
            ended.wait
        )
    finally:
        # One that came meanwhile has been heard.
        ended.wait(0)
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
