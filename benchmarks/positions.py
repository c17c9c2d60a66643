"""Loss at each position of a context, of a sweep's runs, on held-out text: what more tokens before it are worth.

    python -m benchmarks.positions runs/longer --out benchmarks/results/positions-cpu.json

Each finished run that has a checkpoint (``--save-interval`` in its grid) is exported by sla-convert to a temporary
folder, loaded by transformers, and evaluated in fp32 on the part that ``--split`` held out: its documents one after the
other, as Megatron joins them, in windows of the context's length.  Position p is the token that is predicted from p
before it.  All runs of one text and context see the same windows.  Paths in the runs' flags are as they were in
training: start it where sla-sweep was started.

Before that each is evaluated on the very samples of its last evaluation in training, which Megatron's data set gives
again: the loss must be the one that training printed, but for rounding (1e-4).  A run of which it is not ends the
command with status 1, and there is no result; so does one whose vocabulary training pads, which exports leave out.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from sla_megatron.commands.sweep.errors import SweepError
from sla_megatron.commands.sweep.results_folder import RunFolder, SweepFolder
from sla_megatron.commands.sweep.setting import Setting
from sla_megatron.common.errors import StartError
from sla_megatron.common.flag_types import count

from .position_tables import plot, tables
from .record import add_output_args, check_output, write_result

NAME = "positions"

#: Nats up to which a loss is the one that training printed: two implementations in fp32, sums in another order.
LARGEST_DIFFERENCE = 1e-4


def main() -> None:
    """Evaluate every run and write ``--out``."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.positions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of sla-sweep run, with checkpoints")
    tokens = count("--batch-tokens")
    parser.add_argument("--batch-tokens", type=tokens, default=4096, metavar="N", help="at a time (default: 4096)")
    args = add_output_args(parser, NAME).parse_args()
    check_output(parser, args)
    sweep = SweepFolder(args.folder)
    try:
        sweep.require()
        runs = [row for row in sweep.rows() if RunFolder(args.folder / "runs" / row["name"]).checkpoints.is_dir()]
    except SweepError as error:
        parser.error(str(error).replace("--out", "FOLDER"))
    if not runs:
        parser.error(f"FOLDER {args.folder}: no finished run has a checkpoint: expected a grid with --save-interval")
    try:
        rows = [evaluated(args.folder, row, args.batch_tokens, f"{i} of {len(runs)}") for i, row in enumerate(runs, 1)]
    except (StartError, OSError) as error:
        sys.exit(f"benchmarks.positions: error: {error}")
    write_result(args, NAME, "cpu", rows, tables, plot)


def evaluated(folder: Path, run: dict[str, Any], batch_tokens: int, place: str) -> dict[str, Any]:
    """The row of one run; says what it is at.  Raises what :func:`check` does."""
    print(f"{place}: {run['name']}", flush=True)
    # Their import takes seconds.
    from .position_losses import drawn_windows, exported_model, held_out_windows, losses_by_position

    text, context = (flag(run, "--data-path"), flag(run, "--split")), run["context"]
    samples = int(flag(run, "--eval-iters")) * int(flag(run, "--global-batch-size"))
    before = run["iterations"] // int(flag(run, "--eval-interval"))
    batch = max(1, batch_tokens // context)
    with tempfile.TemporaryDirectory(prefix="sla-positions-") as temporary:
        model = exported_model(RunFolder(folder / "runs" / run["name"]).checkpoints, Path(temporary) / "exported")
        drawn = losses_by_position(model, drawn_windows(*text, context, run["seed"], samples, before), batch)
        losses = losses_by_position(model, held_out_windows(*text, context), batch)
    row = row_of(run, losses.mean(0).tolist(), len(losses), float(drawn.mean()))
    line = (
        "loss of the held-out text {loss:.4f}; training printed {validation_loss:.6f} of some of it, here {again:.6f}"
    )
    print(f"  {line.format(**row)}", flush=True)
    check(row)
    return row


def check(row: dict[str, Any]) -> None:
    """Raise :class:`StartError` where the samples of training's last evaluation have another loss here."""
    if not abs(row["again"] - row["validation_loss"]) <= LARGEST_DIFFERENCE:
        printed, again = row["validation_loss"], row["again"]
        raise StartError(
            f"{row['name']}: training printed {printed:.6f}, and on the same samples it is {again:.6f} here"
        )


def row_of(run: dict[str, Any], by_position: list[float], windows: int, again: float) -> dict[str, Any]:
    """What is kept of a run.

    Args:
        run: of the sweep.
        by_position: the mean loss at each position of a context.
        windows: how many there are.
        again: the loss on the samples of training's last evaluation.
    """
    names = ("name", "size", "context", "seed", "num_layers", "num_heads", "num_groups", "tokens", "validation_loss")
    bins = [(first, last, math.fsum(by_position[first - 1 : last])) for first, last in bins_of(len(by_position))]
    return {
        **{name: run[name] for name in names},
        **Setting.of_row(run).as_row(),
        **{"windows": windows, "again": again, "loss": math.fsum(by_position) / len(by_position)},
        "bins": [[first, last, total / (last - first + 1)] for first, last, total in bins],
    }


def bins_of(context: int) -> list[tuple[int, int]]:
    """First and last position of each bin: 1-16, 17-64, 65-128, 129-256, ... to the context's end."""
    ends = [16, 64]
    while ends[-1] < context:
        ends.append(2 * ends[-1])
    ends = [end for end in ends if end < context] + [context]
    return [(first + 1, last) for first, last in zip([0, *ends], ends, strict=False)]


def flag(run: dict[str, Any], name: str) -> str:
    """The value of a run's flag; of one that comes twice the later.  Raises :class:`StartError` without one."""
    words = run["flags"]
    found = [value for word, value in zip(words, words[1:], strict=False) if word == name]
    if not found:
        raise StartError(f"{run['name']} has no {name}: expected one, as examples/sweep/longer.yaml has it")
    return found[-1]


if __name__ == "__main__":
    main()
