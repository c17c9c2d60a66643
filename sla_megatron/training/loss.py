"""One microbatch's forward pass, and the loss of its tokens, as Megatron's trainer asks for them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers
from torch import Tensor

from ..model.report import repeat_report
from .data import get_batch, packed_sequences

#: A loss this many times the largest seen is called a spike, with --check-for-spiky-loss.
_SPIKY_LOSS_FACTOR = 10

#: The one of the process, which Megatron's trainer configures with ``--log-straggler``.
_stragglers = StragglerDetector()


def forward_step(
    data_iterator: Iterator | None, model: GPTModel | HybridModel, return_schedule_plan: bool = False
) -> tuple[Tensor | Any, Any]:
    """One microbatch's forward, as Megatron's schedules call it: the output and the function that makes it a loss.

    With ``return_schedule_plan``, as under ``--overlap-moe-expert-parallel-comm``, a plan in place of the output.
    """
    # The last moment before Megatron's own lines about the first iteration.
    repeat_report()
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _timed(of_data=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
        packed_seq_params = packed_sequences(batch)
    timers("batch-generator").stop()
    with _timed():
        forward = model.build_schedule_plan if return_schedule_plan else model
        output = forward(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed_seq_params,
        )
    return output, partial(language_model_loss, batch["loss_mask"])


def _timed(of_data: bool = False) -> AbstractContextManager[Any]:
    return _stragglers(bdata=of_data) if get_args().log_straggler else nullcontext()


def language_model_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses ``[b, s]`` under ``loss_mask``, how many tokens that was, and both for the log."""
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    _check_loss(args, loss)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def _check_loss(args: Namespace, loss: Tensor) -> None:
    """Megatron's checks for NaN, infinity and spikes, before the loss is averaged over data-parallel ranks."""
    machine = get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [(torch.isnan, "found NaN in local forward loss calculation", True)]
        checks += [(torch.isinf, "found Inf in local forward loss calculation", True)]
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss")
        checks += [(spiky, "Spiky loss", False)]
    for rejects, message, fatal in checks:
        # Tolerance 0: the forward pass is deterministic.
        machine.validate_result(result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal)
