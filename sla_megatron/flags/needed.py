"""What flags need of the machine: packages, and folders that can be made; Megatron finds out when it gets there."""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.errors import OFF
from .hybrid import NOT_INSTALLED as NEEDED_BY_LAYERS
from .rows import Row


def _can_be_made(folder: str) -> bool:
    """Whether the folder is there, or what is there of its path is a folder, and may be written to."""
    if "://" in folder:
        return True
    path = Path(folder).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def _without(package: str, needs: Callable[[Namespace], Any] = lambda args: True) -> Callable[[Namespace], Any]:
    return lambda args: needs(args) and importlib.util.find_spec(package) is None


_NVRX = "nvidia_resiliency_ext"
_NEEDS_NVRX = "the package nvidia-resiliency-ext, which is not installed"

#: Packages that Megatron imports when it gets there.
NOT_INSTALLED = (
    *NEEDED_BY_LAYERS,
    Row(
        "optimizer",
        ("adam", "sgd"),
        "adam or sgd: the package emerging-optimizers is not installed",
        _without("emerging_optimizers"),
    ),
    Row("wandb_project", (None, ""), "the package wandb, which is not installed", _without("wandb")),
    Row("log_straggler", OFF, "the package nvidia-ml-py, which is not installed", _without("pynvml")),
    Row("log_energy", OFF, "the package nvidia-ml-py, which is not installed", _without("pynvml")),
    Row(
        "run_workload_inspector_server",
        OFF,
        "the package workload-inspector, which is not installed",
        _without("workload_inspector"),
    ),
    Row("inprocess_restart", OFF, _NEEDS_NVRX, _without(_NVRX)),
    Row("enable_ft_package", OFF, _NEEDS_NVRX, _without(_NVRX)),
    Row("fault_injector_ranks", OFF, _NEEDS_NVRX, _without(_NVRX)),
    Row("fault_injector_num_ranks", OFF, _NEEDS_NVRX, _without(_NVRX)),
    Row("non_persistent_ckpt_type", (None, "global"), f"global, or {_NEEDS_NVRX}", _without(_NVRX)),
    Row(
        "async_save",
        OFF,
        f"--async-strategy mcore, or {_NEEDS_NVRX}",
        _without(_NVRX, lambda args: args.async_strategy == "nvrx"),
    ),
    *(
        Row(name, OFF, "Transformer Engine, which is not installed", _without("transformer_engine"))
        for name in ("save_activations_interval", "save_dgrads_interval")
    ),
)

#: What a run needs to start; where it is not to start, as in a sweep that is planned, the rest may come later.
AT_START = (
    Row("save", (None,), "a folder that can be made there", lambda args: not _can_be_made(args.save)),
    Row(
        "tensorboard_dir",
        (None,),
        "a folder that can be made there",
        lambda args: not _can_be_made(args.tensorboard_dir),
    ),
    # Megatron divides by it to count validation samples, --eval-iters 0 or not, and has no default.
    Row(
        "eval_interval",
        (),
        "an integer >= 1",
        lambda args: args.eval_interval is None and not (args.full_validation or args.skip_train),
    ),
)
