"""Every run's flags, settled by Megatron before anything is written or trained."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict

from ...common.errors import StartError
from ...cpu.device import add_device_arg, megatron_device, requested_device
from .equal_parameters import Widths
from .errors import SweepError
from .grid import Run


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
            try:
                args = _settled(run, processes)
            except StartError as error:
                raise SweepError(f"{run.name}: {error.reason}") from error
            _require_the_grids(run, args)


def _settled(run: Run, processes: int | None) -> Namespace:
    from ...flags.arguments import settled_args
    from ...flags.asked import fewest_gpus
    from ...flags.entry_point import require_pretraining

    def check(args: Namespace) -> None:
        args.rank, args.world_size = 0, processes or fewest_gpus(args)
        require_pretraining(args)
        if args.device != "cpu":
            # Megatron's default, which needs Transformer Engine here.
            args.apply_rope_fusion = False

    return settled_args(
        add_device_arg,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        check=check,
        will_run_here=requested_device(run.flags) == "cpu",
        argv=run.flags,
        silent=True,
    )


def _require_the_grids(run: Run, args: Namespace) -> None:
    """That Megatron reads off the flags what the sweep read, and that there is a loss to compare."""
    from ...flags.skipping import num_attention_layers

    shape = run.shape
    pairs = {
        "--num-layers": (shape.num_layers, num_attention_layers(args)),
        "--seq-length": (shape.context, args.seq_length),
        "--global-batch-size": (shape.global_batch_size, args.global_batch_size),
        "--train-iters": (run.iterations, args.train_iters),
        "--seed": (run.seed, args.seed),
    }
    if run.setting.ffn_hidden_size is not None:
        # The dense run's is its default, or among its flags.
        of_dense = Widths.of_flags(run.name, run.dense_flags, shape.num_heads)
        ours, megatrons = asdict(of_dense) | {"ffn_hidden_size": run.setting.ffn_hidden_size}, Widths.of_args(args)
        pairs |= {name: (value, getattr(megatrons, name)) for name, value in ours.items()}
    for flag, (ours, megatrons) in pairs.items():
        if ours != megatrons:
            raise SweepError(f"{run.name}: {flag} {ours} is {megatrons} to Megatron: expected the same")
    if not args.eval_iters:
        raise SweepError(f"{run.name}: --eval-iters {args.eval_iters}: expected 1 or more, for a loss to compare")
    if not args.eval_interval:
        raise SweepError(f"{run.name}: --eval-interval: expected 1 or more")
