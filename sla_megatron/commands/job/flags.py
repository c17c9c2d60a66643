"""The few of Megatron's flags that a chain of attempts depends on, and those that it cannot be run with."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import StartError


class JobError(StartError):
    """Why a job must not start, as one line."""


#: What Megatron does with the flag at every start (``load_checkpoint`` in megatron/training/checkpointing.py), and what
#: is expected in its place.  A chain starts many times with the same flags.
_ONCE: dict[str, tuple[str, str]] = {
    "--finetune": ("would begin anew at each attempt", "--pretrained-checkpoint for the weights"),
    "--ckpt-step": (
        "would go back to that iteration at each attempt, and save over newer ones",
        "newer iter_* folders moved away once: an attempt begins from the newest that is there",
    ),
    "--override-ckpt-iteration": (
        "would count from that iteration again at each attempt",
        "one training outside of a job that saves under it",
    ),
    "--no-load-optim": (
        "would begin with a new optimizer at each attempt",
        "--pretrained-checkpoint, which loads weights alone, for the first",
    ),
    "--no-save-optim": ("leaves each attempt to begin with a new optimizer", "checkpoints with the optimizer"),
    "--no-load-rng": ("would draw the same random numbers again at each attempt", "no such flag"),
    "--no-save-rng": ("leaves each attempt to draw the same random numbers again", "no such flag"),
    "--ckpt-convert-format": ("converts and ends, and nothing is trained", "it outside of a job"),
    "--moe-use-upcycling": (
        "makes a model anew of a dense one at each attempt",
        "it outside of a job, and then its checkpoint as --pretrained-checkpoint",
    ),
}

_SWITCHES = (
    "--finetune",
    "--no-load-optim",
    "--no-save-optim",
    "--no-load-rng",
    "--no-save-rng",
    "--moe-use-upcycling",
)


@dataclass(frozen=True)
class TrainingFlags:
    """What a chain depends on; None is a flag that was not given."""

    save: Path
    train_iters: int | None
    train_samples: int | None = None
    global_batch_size: int | None = None
    step_batch_size_schedule: str | None = None
    skip_train: bool = False
    must_find_checkpoint: bool = False
    save_interval: int | None = None
    save_retain_interval: int | None = None

    def last_iteration(self, stored: Mapping[str, Any]) -> int | None:
        """After which Megatron has nothing left to train (``update_train_iters`` in megatron/training/training.py).

        Args:
            stored: the arguments in the newest checkpoint.  Megatron keeps there how many iterations it made of
                ``--train-samples``, which is taken while the flags that this depends on are the same.

        Returns:
            None where it cannot be known.
        """
        if self.train_iters or not self.train_samples:
            return self.train_iters
        same = (
            stored.get("train_samples") == self.train_samples
            and stored.get("step_batch_size_schedule") == self.step_batch_size_schedule
            # Without a value the batch is what the layout makes it.
            and self.global_batch_size in (None, stored.get("global_batch_size"))
        )
        if same and isinstance(stored.get("train_iters"), int):
            return stored["train_iters"]
        if self.step_batch_size_schedule is None and self.global_batch_size:
            return self.train_samples // self.global_batch_size
        return None

    def finished(self, newest: int | None, stored: Mapping[str, Any]) -> bool:
        """Whether the checkpoint of iteration ``newest`` is the last; an evaluation alone never is."""
        last = self.last_iteration(stored)
        return not self.skip_train and last is not None and stored.get("iteration", newest or 0) >= last


def training_flags(flags: Sequence[str]) -> TrainingFlags:
    """Read from all flags of a run, the last of a name counts; as Megatron's, the parser takes no abbreviations.

    Raises:
        JobError: where the chain could not go on from what it saves.
    """
    found = _parsed(flags)
    if found.save is None:
        raise JobError("--save: expected a folder, where an attempt goes on from")
    if found.load is None or found.load.absolute() != found.save.absolute():
        raise JobError(
            f"--load {found.load}: expected the folder of --save, {found.save}, where an attempt goes on from; "
            "weights to begin with are --pretrained-checkpoint"
        )
    for flag, (does, expected) in _ONCE.items():
        value = getattr(found, flag[2:].replace("-", "_"))
        # An evaluation leaves no checkpoint behind.
        if value not in (None, False) and not found.skip_train:
            shown = flag if value is True else f"{flag} {value}"
            raise JobError(f"{shown} {does}: expected {expected}")
    if found.ckpt_format != "torch_dist":
        raise JobError(f"--ckpt-format {found.ckpt_format}: expected torch_dist, whose checkpoints can be checked")
    if found.exit_signal != "SIGTERM":
        raise JobError(
            f"--exit-signal {found.exit_signal}: expected SIGTERM, by which Slurm and torchrun have ranks save"
        )
    return TrainingFlags(
        save=found.save,
        train_iters=found.train_iters,
        train_samples=found.train_samples,
        global_batch_size=found.global_batch_size,
        step_batch_size_schedule=found.step_batch_size_schedule,
        skip_train=found.skip_train,
        must_find_checkpoint=found.exit_on_missing_checkpoint and found.pretrained_checkpoint is None,
        save_interval=found.save_interval,
        save_retain_interval=found.save_retain_interval,
    )


def _parsed(flags: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--save", "--load"):
        parser.add_argument(flag, type=Path)
    whole = ("--train-iters", "--train-samples", "--global-batch-size", "--save-interval", "--save-retain-interval")
    for flag in whole:
        parser.add_argument(flag, type=int)
    for flag in ("--step-batch-size-schedule", "--pretrained-checkpoint"):
        parser.add_argument(flag)
    for flag in _ONCE:
        parser.add_argument(flag, **({"action": "store_true"} if flag in _SWITCHES else {}))
    for flag in ("--skip-train", "--exit-on-missing-checkpoint"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--ckpt-format", default="torch_dist")
    parser.add_argument("--exit-signal", default="SIGTERM")
    try:
        return parser.parse_known_args(list(flags))[0]
    except argparse.ArgumentError as error:
        raise JobError(str(error)) from error
