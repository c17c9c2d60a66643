"""The command lines that trainer tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .launch import free_ports, run_worker

ITERATIONS = 5

#: A GPT of 4 layers and 4 groups on Megatron's mock data.  Dropout stays at Megatron's default, 0.1, unless a test
#: compares runs of different tensor-parallel sizes.
MODEL = {
    "num-layers": 4,
    "hidden-size": 32,
    "num-attention-heads": 4,
    "seq-length": 16,
    "max-position-embeddings": 16,
    "micro-batch-size": 2,
    "global-batch-size": 8,
    "train-iters": ITERATIONS,
    "lr": 0.01,
    "lr-warmup-iters": 1,
    "lr-decay-iters": 20,
    "clip-grad": 1.0,
    "mock-data": True,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 127,
    "log-interval": 1,
    "eval-iters": 1,
    "eval-interval": 100,
    "tensor-model-parallel-size": 2,
}

#: Megatron pads the vocabulary to a multiple of this times the tensor-parallel size: the same 128 for every size.
PADDED_VOCABULARY = 128

NO_DROPOUT = {"attention-dropout": 0.0, "hidden-dropout": 0.0}

#: Relative tolerance between runs that should be the same but add in another order, as other tensor-parallel sizes do:
#: optimizer steps amplify fp32 rounding a little each.
CLOSE = 1e-5

#: What the CPU backend chooses by itself, for the run that uses upstream's own parser.
CPU_FLAGS = [
    "--distributed-backend=gloo",
    "--transformer-impl=local",
    "--use-cpu-initialization",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--num-workers=0",
]


def argv(**changes: Any) -> list[str]:
    """Megatron's flags for :data:`MODEL` with ``changes``: ``True`` is a bare flag, ``None`` and ``False`` none."""
    settings = MODEL | {name.replace("_", "-"): value for name, value in changes.items()}
    settings.setdefault("make-vocab-size-divisible-by", PADDED_VOCABULARY // settings["tensor-model-parallel-size"])
    flags: list[str] = []
    for name, value in settings.items():
        if value is True:
            flags.append(f"--{name}")
        elif isinstance(value, list | tuple):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            flags += [f"--{name}", str(value)]
    return flags


def train_on_all_ranks(
    requests: dict[str, dict[str, Any]], world_size: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Run all of ``requests`` (name -> ``argv``, ``entry``, ``pipeline``) in one group of ranks; an answer for each."""
    ports = free_ports(len(requests))
    with_ports = {
        name: {**request, "port": port} for (name, request), port in zip(requests.items(), ports, strict=True)
    }
    answers = run_worker("trainer_worker", with_ports, world_size, folder)
    return {name: [answer[name] for answer in answers] for name in requests}


def figures(answers: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """A run's iterations, losses, gradient norms and evaluations, all ranks having ended well.

    Of a pipeline the last stage alone knows the loss; a step that was skipped, with fp16, has none.
    """
    assert [answer["status"] for answer in answers] == [0] * len(answers), answers[0]["stderr"]
    last = next(answer for answer in answers if any(loss is not None for loss in answer["loss"]))
    return {what: last[what] for what in ("iteration", "loss", "grad_norm", "evaluations")}


def train(requests: dict[str, dict[str, Any]], world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """:func:`train_on_all_ranks`, rank 0's answers."""
    return {name: answers[0] for name, answers in train_on_all_ranks(requests, world_size, folder).items()}
