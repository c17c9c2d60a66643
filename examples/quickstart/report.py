"""What the quickstart says at its end: a table, where things are, and one sentence about what was learned."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from examples.quickstart import flags
from examples.quickstart.training_log import Result
from sla_megatron.common.files import read_json

#: Has dense runs that differ in their seed alone, of a model like this one, on the same text.
SEEDS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "sweep-cpu-methods.json"


def spread_of_seeds(path: Path = SEEDS) -> float:
    """How far apart the validation losses (nats a token) of dense runs are that differ in their seed alone."""
    losses: dict[tuple[str, int], list[float]] = {}
    for row in read_json(path)["rows"]:
        if not row["skip_groups"]:
            losses.setdefault((row["size"], row["context"]), []).append(row["validation_loss"])
    return max(max(of_one) - min(of_one) for of_one in losses.values())


def learned(dense: Result, sla: Result, spread: float) -> str:
    """One sentence: both validation losses, and what one seed says about their difference.

    `spread` is that of seeds alone: a smaller difference says nothing, a larger one asks for more seeds.
    """
    if dense.iteration != sla.iteration:
        return f"The runs ended after {dense.iteration} and {sla.iteration} iterations: their losses do not compare."
    difference = sla.validation_loss - dense.validation_loss
    if not math.isfinite(difference):
        return f"The validation losses are {dense.validation_loss} and {sla.validation_loss}: training went astray."
    where = f"{abs(difference):.4f} {'below' if difference < 0 else 'above'}" if difference else "equal to"
    seeds = f"the {spread:.3f} by which dense models that differ in their seed alone were apart (docs/results.md)"
    if abs(difference) <= spread:
        verdict = f"not more than {seeds}, so this one seed does not say which is better"
    else:
        verdict = f"more than {seeds}, but one seed; several would have to say whether it stays"
    return (
        f"After {dense.iteration * flags.TOKENS_PER_ITERATION:,} tokens the skip-layer model's validation loss is "
        f"{sla.validation_loss:.4f}, {where} the dense model's {dense.validation_loss:.4f}: {verdict}."
    )


def table(dense: Result, sla: Result) -> str:
    """The comparison: one row per quantity, and SLA's value less dense's.

    No speed: of two runs one after the other it is that of whatever else the machine does.
    """
    rows = [
        ("parameters", dense.parameters, sla.parameters, ",d"),
        ("final train loss", dense.train_loss, sla.train_loss, ".4f"),
        ("final validation loss", dense.validation_loss, sla.validation_loss, ".4f"),
    ]
    lines = [f"{'':22}{'dense':>12}{'SLA':>12}{'SLA - dense':>14}"]
    for name, left, right, style in rows:
        lines.append(f"{name:22}{left:>12{style}}{right:>12{style}}{right - left:>+14{style}}")
    return "\n".join(lines)


def report(args: argparse.Namespace, dense: Result, sla: Result, exported: str, drawn: str) -> str:
    """The table, where things are, what to do next, and last the sentence."""
    make = "make quickstart QUICKSTART_ARGS="
    longer = f"--out {args.out} --train-iters {2 * args.train_iters}"
    return f"""
{table(dense, sla)}

Measured on this machine by this quickstart, with one seed. The train loss is the mean since the last line but one.
  checkpoints  {args.out}/dense/checkpoints  {args.out}/sla/checkpoints
  logs         {args.out}/dense.log  {args.out}/sla.log  (the first line is the command to run by hand)
  curves       {Path(sys.executable).parent}/tensorboard --logdir {args.out}
  {drawn}
{exported}
Next
  train longer, from these checkpoints      {make}"{longer}"
  leave out the projections nobody reads    {make}"--out runs/pruned --sla-kv-projection pruned"
  train on GPUs                             the same commands, on a machine that has them

{learned(dense, sla, spread_of_seeds())}
"""
