"""Every run's flags, settled by Megatron before anything is written or trained."""

from __future__ import annotations

import io
import re
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr

from ...common.errors import FlagError
from ...cpu.device import add_device_arg, megatron_device
from ..doctor.job import quietly
from .errors import SweepError
from .grid import Run

_PREFIX = re.compile(r"^[\w.-]+: error: ")


def check_runs(runs: Sequence[Run], processes: int | None = None) -> None:
    """Have Megatron parse and validate each run's flags; seeds make no difference, and one of them is checked.

    Args:
        runs: of a grid.
        processes: the world size; ``None``: the fewest that the parallel sizes divide.

    Raises:
        SweepError: for the first run that would not start, or that is not what the grid says.
    """
    distinct = {(run.size, run.shape.context, run.setting): run for run in runs}.values()
    # The runs may be another machine's: this one need not have its GPU.
    with warnings.catch_warnings(action="ignore"), megatron_device(["--device", "cpu"]):
        for run in distinct:
            with _as_sweep_error(run):
                args = _settled(run, processes)
            _require_the_grids(run, args)


def _settled(run: Run, processes: int | None) -> Namespace:
    from ...flags.arguments import settled_args
    from ...pretrain_gpt import require_pretraining
    from ..plan.settle import fewest_gpus

    def provider(parser: ArgumentParser) -> ArgumentParser:
        parser.prog = "sla-sweep"
        return add_device_arg(parser)

    def check(args: Namespace) -> None:
        require_pretraining(args)
        args.rank, args.world_size = 0, processes or fewest_gpus(args)
        if args.device != "cpu":
            # Megatron's default, which needs Transformer Engine here.
            args.apply_rope_fusion = False

    before, sys.argv = sys.argv, ["sla-sweep", *run.flags]
    try:
        return settled_args(
            provider,
            args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
            check=check,
            will_run_here=run_device(run) == "cpu",
        )
    finally:
        sys.argv = before


def run_device(run: Run) -> str:
    """``--device`` of the run: the last one counts."""
    parser = add_device_arg(ArgumentParser(add_help=False, allow_abbrev=False))
    return parser.parse_known_args(run.flags)[0].device


def _require_the_grids(run: Run, args: Namespace) -> None:
    """That Megatron reads off the flags what the sweep read, and that there is a loss to compare."""
    shape = run.shape
    pairs = {
        "--num-layers": (shape.num_layers, args.num_layers),
        "--seq-length": (shape.context, args.seq_length),
        "--global-batch-size": (shape.global_batch_size, args.global_batch_size),
        "--train-iters": (run.iterations, args.train_iters),
        "--seed": (run.seed, args.seed),
    }
    for flag, (ours, megatrons) in pairs.items():
        if ours != megatrons:
            raise SweepError(f"{run.name}: {flag} {ours} is {megatrons} to Megatron: expected the same")
    if not args.eval_iters:
        raise SweepError(f"{run.name}: --eval-iters {args.eval_iters}: expected 1 or more, for a loss to compare")
    if not args.eval_interval:
        raise SweepError(f"{run.name}: --eval-interval: expected 1 or more")


@contextmanager
def _as_sweep_error(run: Run) -> Iterator[None]:
    """Turn whatever parsing and validating raise into one line, and drop what they print."""
    printed = io.StringIO()
    try:
        with quietly(), redirect_stderr(printed):
            yield
    except FlagError as error:
        raise SweepError(f"{run.name}: {_PREFIX.sub('', str(error))}") from error
    except SystemExit as ended:
        # argparse prints its usage, two thousand lines, and then what is wrong.
        last = next(iter(reversed(printed.getvalue().strip().splitlines())), "Megatron gave up")
        raise SweepError(f"{run.name}: {_PREFIX.sub('', last)}") from ended
    except Exception as error:
        # An assertion without a message says in its own code what it wants.
        text = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        raise SweepError(f"{run.name}: Megatron does not accept these flags: {' '.join(text.split())}") from error
