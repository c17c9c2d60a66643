"""Train a dense model and a skip-layer one on the same batches, step by step in turns, and evaluate both.

With tensor parallelism each rank has its shards of both models, and reads whole batches.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor

from benchmarks.record import spread

from .ranks import is_first_rank

LEARNING_RATE, WEIGHT_DECAY, LARGEST_GRADIENT = 3e-3, 0.01, 1.0
#: Held-out losses in a curve, after the one at the start.
POINTS = 5
#: Steps that are not timed, where there are more.
WARM_UP = 5


class Task(Protocol):
    """What both models of a seed learn.

    Attributes:
        held_out: a batch that is not trained on.
    """

    held_out: Any

    def next_batch(self) -> Any:
        """Of a step, on the device of the models."""

    def loss(self, model: torch.nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The mean loss of ``batch`` in nats, and which share of it the model has right."""


def take_turns(args: Namespace, seed: int, models: dict[str, torch.nn.Module], task: Task) -> dict[str, Any]:
    """What both models, ``dense`` and ``sla``, learned, and how fast.

    ``seconds`` are of a step, forward to update.  Models take turns in who is first, and ``step_ratio`` is of the
    pairs: dense's time over SLA's, which is SLA's speed over dense's.
    """
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    curve = [_evaluation(models, task, 0)]
    for step in range(1, args.steps + 1):
        batch = task.next_batch()
        for name in sorted(models, reverse=bool(step % 2)):
            _set_learning_rate(optimizers[name], step, args.steps)
            seconds[name].append(_train_step(models[name], optimizers[name], task, batch, args.device))
        if step * POINTS // args.steps > (step - 1) * POINTS // args.steps:
            curve.append(_evaluation(models, task, step))
            if is_first_rank():
                print(f"seed {seed}, step {step}: {_line(curve[-1])}", flush=True)
    timed = {name: values[WARM_UP:] or values for name, values in seconds.items()}
    ratios = [dense / sla for dense, sla in zip(timed["dense"], timed["sla"], strict=True)]
    return {
        "seed": seed,
        "parameters": {name: _parameters(model) for name, model in models.items()},
        "steps": args.steps,
        "curve": curve,
        "seconds": {name: spread(values) for name, values in timed.items()},
        "step_ratio": spread(ratios),
    }


def _train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, task: Task, batch: Any, device: str) -> float:
    """Forward, backward, update; the seconds that they took."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.zero_grad()
    loss, _ = task.loss(model, batch)
    loss.backward()
    _clip_gradients(model)
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _clip_gradients(model: torch.nn.Module) -> None:
    """To a norm of :data:`LARGEST_GRADIENT`, that of the whole model: ranks add up what is of their shards alone."""
    parameters = list(model.parameters())
    square = _squared_norm(each for each in parameters if _is_sharded(each))
    torch.distributed.all_reduce(square, group=parallel_state.get_tensor_model_parallel_group())
    norm = (square + _squared_norm(each for each in parameters if not _is_sharded(each))).sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, LARGEST_GRADIENT, norm)


def _squared_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None]).square()


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Whether this rank has a part of it alone."""
    return getattr(parameter, "tensor_model_parallel", False)


def _parameters(model: torch.nn.Module) -> int:
    """How many numbers the whole model has, whatever part of them is here."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return sum(each.numel() * (ranks if _is_sharded(each) else 1) for each in model.parameters())


def _evaluation(models: dict[str, torch.nn.Module], task: Task, step: int) -> dict[str, Any]:
    """A point of the curve: each model's loss and accuracy on what is held out, after ``step`` steps."""
    point: dict[str, Any] = {"step": step}
    for name, model in models.items():
        model.eval()
        with torch.no_grad():
            loss, accuracy = task.loss(model, task.held_out)
        model.train()
        point[name] = {"loss": float(loss), "accuracy": float(accuracy)}
    return point


def _set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Up over a tenth of the steps, down to zero over the rest."""
    share = min(step / (0.1 * steps), (steps + 1 - step) / (0.9 * steps), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * share


def _line(point: dict[str, Any]) -> str:
    return ", ".join(f"{name} loss {point[name]['loss']:.4f}" for name in ("dense", "sla"))
