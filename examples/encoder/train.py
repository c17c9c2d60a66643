"""Train both encoders on the same batches, step by step in turns, and evaluate them on sentences held out."""

from __future__ import annotations

import random
import time
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import spread

from .data import Batch, batch, without_attention
from .models import dense_and_sla

LEARNING_RATE, WEIGHT_DECAY, LARGEST_GRADIENT = 3e-3, 0.01, 1.0
#: Sentences in a step, and held out.
BATCH_SIZE, HELD_OUT = 16, 1024
#: Held-out losses in a curve, after the one at the start.
POINTS = 5
#: Steps that are not timed, where there are more.
WARM_UP = 5
#: Of the held-out sentences: one that no training seed is.
HELD_OUT_SEED = "held out"


def measure(args: Namespace, seed: int) -> dict[str, Any]:
    """One seed, of the weights and of the order of the data: what both models learned, and how fast.

    ``seconds`` are of a step, forward to update.  Models take turns in who is first, and ``step_ratio`` is of the
    pairs: dense's time over SLA's, which is SLA's tokens/s over dense's.
    """
    models = dense_and_sla(args, seed)
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for name, model in models.items()
    }
    chance = random.Random(seed)
    held_out = batch(random.Random(HELD_OUT_SEED), HELD_OUT, args.seq_length).to("cuda")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    curve = [evaluation(models, held_out, 0)]
    tokens = 0
    for step in range(1, args.steps + 1):
        sentences = batch(chance, BATCH_SIZE, args.seq_length)
        tokens += int(sentences.is_token.sum())
        sentences = sentences.to("cuda")
        for name in sorted(models, reverse=bool(step % 2)):
            _set_learning_rate(optimizers[name], step, args.steps)
            seconds[name].append(train_step(models[name], optimizers[name], sentences, args.device))
        if step * POINTS // args.steps > (step - 1) * POINTS // args.steps:
            curve.append(evaluation(models, held_out, step))
            print(f"seed {seed}, step {step}: " + _line(curve[-1]), flush=True)
    timed = {name: values[WARM_UP:] or values for name, values in seconds.items()}
    ratios = [dense / sla for dense, sla in zip(timed["dense"], timed["sla"], strict=True)]
    return {
        "seed": seed,
        "parameters": {name: sum(each.numel() for each in model.parameters()) for name, model in models.items()},
        "steps": args.steps,
        "tokens": tokens,
        "padded_tokens_a_step": BATCH_SIZE * args.seq_length,
        "held_out_masked_tokens": int(held_out.is_masked.sum()),
        "without_attention": without_attention(held_out),
        "curve": curve,
        "seconds": {name: spread(values) for name, values in timed.items()},
        "step_ratio": spread(ratios),
    }


def train_step(model: Any, optimizer: torch.optim.Optimizer, sentences: Batch, device: str) -> float:
    """Forward, backward, update; the seconds that they took."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.zero_grad()
    loss, _ = masked_loss(model, sentences)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def masked_loss(model: Any, sentences: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross entropy (nats) at the masked tokens, and how many of them the largest logit has right, as a share."""
    logits, _ = model(sentences.tokens, sentences.is_token.float())
    logits, labels = logits[sentences.is_masked], sentences.labels[sentences.is_masked]
    return torch.nn.functional.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()


def evaluation(models: dict[str, Any], held_out: Batch, step: int) -> dict[str, Any]:
    """A point of the curve: each model's loss and accuracy on ``held_out`` after ``step`` steps."""
    point: dict[str, Any] = {"step": step}
    for name, model in models.items():
        model.eval()
        with torch.no_grad():
            loss, accuracy = masked_loss(model, held_out)
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
