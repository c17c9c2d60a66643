"""Logs of training runs that were made elsewhere, as a result of ``benchmarks.loss``.

    python -m benchmarks.loss_logs benchmarks/results/loss-gpu-124m-4k --out benchmarks/results/loss-gpu-124m-4k.json

The folder has ``runs.json``: what the runs have in common (model, context, global_batch_size, seed, the flags and the
data), where they were made (commit, date, machine), and for each variant, dense among them, the name of its log and its
flags beyond dense's.  What a log says is read from it; times in it do not count.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.quickstart.training_log import Records, summarise
from sla_megatron.common.files import read_json

from .loss import NAME, plot, tables
from .record import add_output_args, check_output, command_line, publish

INDEX = "runs.json"
_COMMON = ("model", "context", "global_batch_size", "seed", "flags", "data")
_PLACE = ("commit", "date", "machine")


def main() -> None:
    """Read the logs and write ``--out``."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.loss_logs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=f"logs, and {INDEX}")
    args = add_output_args(parser, NAME).parse_args()
    check_output(parser, args)
    try:
        result = read_runs(args.folder)
    except (OSError, ValueError) as error:
        parser.error(f"FOLDER {args.folder}: {error}: expected {INDEX} and the logs that it names")
    publish(result, args.out, tables, plot)


def read_runs(folder: Path) -> dict[str, Any]:
    """The result.  Raises ``OSError`` or :class:`ValueError` for what is missing."""
    index = read_json(folder / INDEX)
    if index is None:
        raise ValueError(f"no {INDEX}")
    lacking = [key for key in (*_COMMON, *_PLACE, "runs") if key not in index]
    if lacking or "dense" not in index["runs"]:
        raise ValueError(f"{INDEX} lacks {', '.join(lacking) or 'the run dense'}")
    rows = [_row(index, folder, variant, run) for variant, run in index["runs"].items()]
    settings = {key: index[key] for key in _COMMON} | {"variants": index["runs"]}
    place = {key: index[key] for key in _PLACE}
    return {"benchmark": NAME, "command": command_line(), **place, "settings": settings, "rows": rows}


def _row(index: dict[str, Any], folder: Path, variant: str, run: dict[str, str]) -> dict[str, Any]:
    tokens = index["context"] * index["global_batch_size"]
    records = Records()
    with (folder / run["log"]).open(errors="replace") as lines:
        for line in lines:
            records.read(line)
    try:
        result = summarise(records, tokens)
    except ValueError as error:
        raise ValueError(f"{run['log']}: {error}") from None
    return {
        **{key: index[key] for key in ("model", "context")},
        **{"variant": variant, "seed": index["seed"], "iterations": result.iteration},
        **{"tokens": result.iteration * tokens, "parameters": result.parameters},
        "train_losses": [[step.iteration, step.loss] for step in records.steps],
        "validation_loss": result.validation_loss,
    }


if __name__ == "__main__":
    main()
