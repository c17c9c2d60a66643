"""Pretraining whose batches are four tokens shorter than ``--seq-length``; run by ``trainer_worker`` as a script."""

from __future__ import annotations

from typing import Any

from sla_megatron import pretrain_gpt
from sla_megatron.training import loss

whole_batch = loss.get_batch


def short_batch(*args: Any) -> dict[str, Any]:
    """The batch without its last four tokens."""
    batch = whole_batch(*args)
    mask = batch.pop("attention_mask")
    short = {key: None if tensor is None else tensor[:, :-4] for key, tensor in batch.items()}
    return short | {"attention_mask": None if mask is None else mask[..., :-4, :-4]}


if __name__ == "__main__":
    loss.get_batch = short_batch
    pretrain_gpt.main()
