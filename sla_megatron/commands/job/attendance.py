"""What is done beside a training: new checkpoints are looked into, old ones removed, and people's files seen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...common.amounts import shown_size
from ...common.checkpoint_contents import damage, size
from ...common.checkpoint_folders import checkpoints, problem, stored_args, tracked
from .chain import Chain
from .checked import FILE, Checked, Look, fingerprint, spoils
from .flags import TrainingFlags
from .keep import Keep, remove, remove_rest, space_warning, written_by

#: Exit statuses upon which a launcher ends the step: after a save, and without one.
SAVE_AND_EXIT, RESUMED_FROM_DAMAGE = 20, 21

#: How many seconds are left for a look, or a removal, after training has ended.
_LEFT = 3.0


class _Over(Exception):
    """Why a look is left unfinished: the exit status, 0 when training has ended."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class Attendance:
    """One attempt's.

    Args:
        run: the run's folder.
        flags: of the run.
        keep: which checkpoints stay; None: all.
        contents: whether checkpoints are looked into; else their sizes count alone.
        own_script: the trainer is not ours, and knows nothing of ``save``.
        say: receives lines for the log.
        told: whether training has ended.
    """

    run: Path
    flags: TrainingFlags
    keep: Keep | None
    contents: bool
    own_script: bool
    say: Callable[[str], None]
    told: Callable[[], bool]
    _leave_at: float | None = None
    _asked_at: float = 0.0
    _warned: bool = False
    #: What was there when nothing was left to do.
    _seen: object = None
    _whole: dict[Path, str] = field(default_factory=dict)
    _unnoted: set[Path] = field(default_factory=set)
    _failures: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._chain, self._checked = Chain.read(self.run), Checked(self.run)
        #: The iteration that this attempt resumed from, 0 for none.
        self._began_at = self._chain.attempts[-1].began_at if self._chain.attempts else 0

    def attend(self, wait: Callable[[], object]) -> int:
        """Until training ends, or is to end: the exit status.  ``wait`` lets a second or so pass, or less."""
        try:
            while True:
                if not self._tried():
                    if self.told():
                        return 0
                    wait()
        except _Over as over:
            return over.status

    def _tried(self) -> bool:
        """A round; a file system that fails for a while does not end the attendance."""
        try:
            self._ask()
            if self.keep is not None and self._seen is None:
                remove_rest(self.flags.save, self._late)
            return self.round()
        except FileNotFoundError:
            # Megatron removes checkpoints too.
            return False
        except OSError as error:
            if str(error) not in self._failures:
                self._failures.add(str(error))
                self.say(f"{error.filename}: {error.strerror}; it is tried again")
            return False

    def round(self) -> bool:
        """Look into one checkpoint that is new, or make room; whether there may be more to do at once."""
        said = tracked(self.flags.save)
        # The tracker is what Megatron writes last.
        written = [
            (iteration, path)
            for iteration, path in checkpoints(self.flags.save).items()
            if not isinstance(said, int) or iteration <= said
        ]
        if (said, written) == self._seen:
            return False
        there = {iteration: path for iteration, path in written if self._complete(path)}
        looks = {iteration: self._checked.look(path) for iteration, path in there.items()}
        path = self._next(there, looks) if self.contents else None
        if path is not None:
            return self._look(path)
        self._make_room(there, looks)
        self._seen = said, written
        return False

    def _complete(self, path: Path) -> bool:
        """Large metadata take a while to read: once for files as they are."""
        now = fingerprint(path)
        if self._whole.get(path) != now and problem(path) is None:
            self._whole[path] = now
        return self._whole.get(path) == now

    def _next(self, there: dict[int, Path], looks: dict[int, Look | None]) -> Path | None:
        """The checkpoint to look into: what was resumed from, then from the newest on to one to fall back to."""
        falls_back = False
        for iteration in sorted(there, key=lambda each: (each == self._began_at, each), reverse=True):
            if falls_back and iteration < self._began_at:
                return None
            look = looks[iteration]
            if look is None and there[iteration] not in self._unnoted:
                return there[iteration]
            falls_back |= look is not None and look.damage is None and iteration <= self._began_at
        return None

    def _make_room(self, there: dict[int, Path], looks: dict[int, Look | None]) -> None:
        if not there:
            return
        if not self._warned:
            newest = there[max(there)]
            last = self.flags.last_iteration(stored_args(newest))
            warning = space_warning(self.keep, self.flags, there, last, size(newest))
            self._warned = True
            if warning is not None:
                self.say(f"warning: {warning}")
        if self.keep is None:
            return
        damaged = {iteration for iteration, look in looks.items() if look is not None and look.damage is not None}
        unseen = {iteration for iteration, look in looks.items() if look is None} if self.contents else set()
        for iteration in self.keep.surplus(there.keys() - damaged - unseen, unseen):
            path = there[iteration]
            if path.is_symlink() or not written_by(self._chain, iteration):
                continue
            whole = remove(path, self._late)
            self.say(
                f"{path.name} {'is removed' if whole else 'will be removed by the next attempt'}: KEEP={self.keep}"
            )

    def _look(self, path: Path) -> bool:
        """Whether it was looked into to the end; it may have been changed or removed meanwhile."""
        began = time.monotonic()
        try:
            before = fingerprint(path)
            found = damage(path, self._ask)
            if fingerprint(path) != before:
                return False
        except FileNotFoundError:
            return False
        try:
            self._checked.note(path, before, None if found is None else found.text)
        except OSError as error:
            # A full disk, say.  It need not be read time and again.
            self._unnoted.add(path)
            self.say(f"{self.run / FILE}: {error.strerror}: what is found in {path.name} is not remembered")
        if found is None:
            self.say(f"{path.name} is whole and finite: {shown_size(size(path))} in {time.monotonic() - began:.1f} s")
            return True
        self.say(f"{path} is damaged: {found}; the next attempt will go on from one that is not")
        if found.not_finite:
            self.say("it was written so, and what this training saves after it will probably be no better")
        if int(path.name[5:]) == self._began_at and spoils(self._checked, path, self._chain.attempts[-1].began):
            self.say("this attempt resumed from it: what it has trained since is of no use")
            raise _Over(RESUMED_FROM_DAMAGE)
        return True

    def _late(self) -> bool:
        """Whether training has ended, and so long ago that what is under way is left as it is."""
        if self._leave_at is None and self.told():
            self._leave_at = time.monotonic() + _LEFT
        return self._leave_at is not None and time.monotonic() > self._leave_at

    def _ask(self, count: int = 0) -> None:
        """End what is under way where it is to end; asked after every piece of a look."""
        now = time.monotonic()
        if now - self._asked_at < 0.2:
            return
        self._asked_at = now
        if self._late():
            raise _Over(0)
        if self._leave_at is not None:
            # The files are for a training that there is not any more.
            return
        # What cannot be asked at the moment is not there; nor is it a fault of the checkpoint that is looked into.
        if os.path.exists(self.run / "stop"):
            self.say(f"{self.run / 'stop'}: the ranks save and exit")
            raise _Over(SAVE_AND_EXIT)
        request = self.run / "save"
        if self.own_script and os.path.exists(request):
            try:
                done = request.rename(self.run / "save_taken")
            except OSError as error:
                # It would end each attempt.
                self.own_script = False
                self.say(f"{request} cannot be renamed ({error.strerror}), and is not heeded by this attempt")
                return
            self.say(f"{request}: the ranks save and exit, and go on as the next attempt; it is now {done.name}")
            raise _Over(SAVE_AND_EXIT)
