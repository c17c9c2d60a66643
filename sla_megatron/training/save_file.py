"""``touch RUN/save``: the ranks save at the end of the step that they are in, and train on.

Under ``--exit-signal-handler`` Megatron asks all ranks at each step whether one of them got the signal.  What rank 0
says there has room for one thing more: that the file is there.  So all ranks know in the same step, and nothing is sent
besides.  Once the checkpoint is whole rank 0 renames the file, to ``saved_at_ITERATION``; it removes none.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from ..common.errors import flag_of
from ..upstream.seams import Wrapping, wrap_once

#: Names the run's folder, which launch/slurm.sbatch sets.
RUN_FOLDER = "SLA_RUN_FOLDER"

# Between two looks for the file.
_SECONDS = 1.0
# What rank 0 says of the file where Megatron's handler says 0 or 1 of the signal.
_ASKED = 2


class SaveFile:
    """The file of one run, on one rank; rank 0 alone looks for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: In the step at hand, on all ranks.
        self.asked = False
        #: The iteration that is being saved where Megatron resumes from, and the last that was handed to the writer.
        self.saving: int | None = None
        self.saved: int | None = None
        self._seen = self._said = False
        self._looked = float("-inf")
        # A file that could not be renamed: it asked once.
        self._done: tuple[int, int] | None = None

    def said(self, signalled: int) -> int:
        """What rank 0 says at this step, where Megatron would say ``signalled``."""
        if time.monotonic() - self._looked >= _SECONDS:
            self._looked = time.monotonic()
            self._seen = self._seen or self._identity() not in (None, self._done)
        if signalled or not self._seen or self._said:
            return signalled
        self._said = True
        return _ASKED

    @property
    def waiting(self) -> bool:
        """Whether the file was seen and is not yet renamed; never but on rank 0."""
        return self._seen

    def finished(self, iteration: int) -> None:
        """The checkpoint of ``iteration`` is whole; does nothing unless the file waits for one."""
        if not self._seen:
            return
        self._seen = self._said = False
        self._done = self._identity()
        renamed = self.path.with_name(f"saved_at_{iteration}")
        for number in range(2, 1000):
            if not os.path.lexists(renamed):
                break
            renamed = self.path.with_name(f"saved_at_{iteration}_{number}")
        try:
            self.path.rename(renamed)
            now = f"it is now {renamed.name}"
        except OSError as error:
            now = f"it cannot be renamed ({error.strerror}), and is not heeded again until it is made anew"
        print(f"sla-megatron: iteration {iteration} is saved, as {self.path} asked; {now}", flush=True)

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


#: Of the run that is under way.
_file: SaveFile | None = None


def heed_save_file(args: Namespace) -> None:
    """Have this run save when ``$SLA_RUN_FOLDER/save`` appears.

    Nothing is touched without the variable, ``--save`` and ``--exit-signal-handler``.
    """
    global _file
    _file, folder = None, os.environ.get(RUN_FOLDER)
    if not folder:
        return
    if args.save is None or not args.exit_signal_handler:
        if args.rank == 0:
            missing = " and ".join(flag_of(name) for name in ("save", "exit_signal_handler") if not getattr(args, name))
            print(f"sla-megatron: {folder}/save is not heeded without {missing}", flush=True)
        return
    wrap_once(WRAPPINGS)
    _file = SaveFile(Path(folder) / "save")


def _with_the_file(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def all_gather_item(item: Any, *args: Any, **kwargs: Any) -> list[int]:
        from torch.distributed import get_rank

        if _file is None:
            return original(item, *args, **kwargs)
        said = original(_file.said(int(item)) if get_rank() == 0 else item, *args, **kwargs)
        _file.asked = _ASKED in said
        return [0 if each == _ASKED else each for each in said]

    return all_gather_item


def _then_saved(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def checkpoint_and_decide_exit(
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        iteration: int,
        num_floating_point_operations_so_far: Any,
        checkpointing_context: Any,
        train_data_iterator: Any,
    ) -> bool:
        from megatron.training import get_args, training

        if _file is not None:
            _file.asked = False
        of_the_state = model, optimizer, opt_param_scheduler
        of_the_run = num_floating_point_operations_so_far, checkpointing_context
        ends = original(*of_the_state, iteration, *of_the_run, train_data_iterator)
        # After the last iteration Megatron saves by itself.
        last = not ends and iteration >= get_args().train_iters
        if _file is not None and _file.asked and _file.saved != iteration and not last:
            training.save_checkpoint_and_time(
                iteration, *of_the_state, *of_the_run, train_data_iterator=train_data_iterator
            )
        return ends

    return checkpoint_and_decide_exit


def _noted(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_checkpoint_and_time(iteration: int, *args: Any, non_persistent_ckpt: bool = False, **kwargs: Any) -> Any:
        from megatron.training import get_args

        if _file is None or non_persistent_ckpt:
            return original(iteration, *args, non_persistent_ckpt=non_persistent_ckpt, **kwargs)
        _file.saving = iteration
        try:
            result = original(iteration, *args, **kwargs)
        finally:
            _file.saving = None
        _file.saved = iteration
        if not get_args().async_save:
            _file.finished(iteration)
        return result

    return save_checkpoint_and_time


def _finished_later(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def schedule_async_save(async_request: Any) -> Any:
        file, iteration = _file, None if _file is None else _file.saving
        if file is not None and file.waiting and iteration is not None:
            async_request.add_finalize_fn(lambda: file.finished(iteration))
        return original(async_request)

    return schedule_async_save


_STATE = ("model", "optimizer", "opt_param_scheduler")
_RUN = ("num_floating_point_operations_so_far", "checkpointing_context")

WRAPPINGS = (
    Wrapping(
        "megatron.training.dist_signal_handler:all_gather_item",
        "what the ranks tell each other of the exit signal at each step: rank 0 says 2 where the save file is there",
        ("item", "dtype", "group", "async_op", "local_rank"),
        wrap=_with_the_file,
    ),
    Wrapping(
        "megatron.training.training:checkpoint_and_decide_exit",
        "the end of a step, where Megatron saves: so it does where the save file was there, unless it just has",
        (*_STATE, "iteration", *_RUN, "train_data_iterator"),
        wrap=_then_saved,
    ),
    Wrapping(
        "megatron.training.training:save_checkpoint_and_time",
        "called to save; and which iteration was saved, by whomever, so that none is twice",
        ("iteration", *_STATE, *_RUN, "non_persistent_ckpt", "train_data_iterator"),
        wrap=_noted,
    ),
    Wrapping(
        "megatron.training.checkpointing:schedule_async_save",
        "an asynchronous save is whole when its last callback is called: then the save file is renamed",
        ("async_request",),
        wrap=_finished_later,
    ),
)
