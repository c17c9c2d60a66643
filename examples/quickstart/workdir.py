"""The quickstart's output directory: what is in it, whose it is, and what may be done to it.

OUT/settings.json            what the runs in it were made with; marks the directory as the quickstart's
OUT/data, OUT/cache          the data set, and Megatron's sample order
OUT/{dense,sla}/             checkpoints, tensorboard, result.json once finished
OUT/{dense,sla}.log          everything training printed, every launch appended
OUT/losses.svg               the picture of both, where matplotlib is installed
OUT/summary.txt              the table, and what was learned
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from examples.quickstart.training_log import Result
from sla_megatron.common import files
from sla_megatron.common.errors import flag_of
from sla_megatron.common.replacing import foreign_content
from sla_megatron.flags.skipping import SLA_SETTINGS

MODELS = ("dense", "sla")
SETTINGS = "settings.json"
LOCK = ".lock"
PICTURE = "losses.svg"
# Removed in this order: as long as the settings are there, the rest is known to be the quickstart's.
MADE_HERE = (
    "dense",
    "sla",
    "dense.log",
    "sla.log",
    "data",
    ".data.partial",
    "cache",
    PICTURE,
    "summary.txt",
    SETTINGS,
)


# What is made in those folders, by name within OUT.
_MADE_INSIDE = re.compile(
    r"(dense|sla)/(result\.json|checkpoints/(iter_\d+/.*|latest_checkpointed_iteration\.txt|progress\.txt)|"
    r"tensorboard/.*|hf/.*)"
    r"|(data|\.data\.partial)/(corpus\.\w+|corpus\.sla-data/.*|tokenizer\.model|[\w-]+\.json)"
    r"|cache/.*"
)
# A file of this name may be anybody's.
_SETTINGS_KEYS = {"tp", "device", "text", "eval_iters", "corpus_mb", "vocab_size", "megatron", *SLA_SETTINGS}


class WorkdirError(RuntimeError):
    """The output directory cannot be used as asked; the message is one line for the user."""


def write_json(path: Path, value: dict) -> None:
    """Writes `value` so that `path` is either the old file or the whole new one; makes its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, value)


def read_settings(out: Path) -> dict | None:
    """Settings of the runs in `out`, None when there are none; WorkdirError for somebody else's files."""
    path = out / SETTINGS
    if path.is_file():
        try:
            settings = json.loads(path.read_text())
        except ValueError:
            raise WorkdirError(f"--out {out}: expected a directory whose {SETTINGS} can be read") from None
        if isinstance(settings, dict) and settings.keys() <= _SETTINGS_KEYS:
            return settings
    if out.is_dir() and any(entry.name != LOCK for entry in out.iterdir()):
        raise WorkdirError(f"--out {out}: expected an empty or new directory, or one made by the quickstart")
    if out.exists() and not out.is_dir():
        raise WorkdirError(f"--out {out}: expected a directory")
    return None


def check_settings(out: Path, settings: dict) -> None:
    """Raises WorkdirError, naming the first difference, unless `out` is new or was made with `settings`."""
    recorded = read_settings(out)
    # Directories of before --text have code.
    for name, before in ({"text": "code"} | recorded if recorded else {}).items():
        if settings.get(name) != before:
            raise WorkdirError(
                f"{flag_of(name)} {settings.get(name)}: expected {before}, which the runs in {out} were made with; "
                "choose another --out, or --fresh to start over"
            )


def load_result(out: Path, model: str) -> Result | None:
    """What the finished run of `model` measured; None when it has not finished."""
    path = out / model / "result.json"
    return Result(**json.loads(path.read_text())) if path.is_file() else None


def clear(out: Path) -> None:
    """Removes what the quickstart made in `out`, and nothing else.

    Raises WorkdirError, with nothing removed, where one of its directories holds somebody else's file.
    """
    if read_settings(out) is None:
        return
    for name in MADE_HERE:
        for path in sorted((out / name).rglob("*")):
            if not path.is_dir() and not _MADE_INSIDE.fullmatch(str(path.relative_to(out))):
                raise WorkdirError(f"--out {out}: {path} is not the quickstart's: expected it to be moved away")
    hf = out / "sla" / "hf"
    if hf.is_dir() and (foreign := foreign_content(hf)) is not None:
        raise WorkdirError(f"--out {out}: {foreign}: expected it to be moved away")
    for name in MADE_HERE:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds `out` (made if missing) for this process. Raises WorkdirError when another quickstart has it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(f"--out {out}: another quickstart is running there") from None
        yield
