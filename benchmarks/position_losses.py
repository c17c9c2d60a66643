"""The parts of ``positions`` that compute: held-out windows, an exported model, its loss at each position."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sla_megatron.commands.convert.commands import megatron_to_hf, open_megatron
from sla_megatron.common.errors import StartError
from sla_megatron.common.silence import without_announcements
from sla_megatron.common.splits import split_ranges
from sla_megatron.common.waiting import bar


def held_out_windows(prefix: str, split: str, context: int) -> Tensor:
    """``[windows, context + 1]`` tokens of the validation part: each but the first is predicted, once in all.

    As Megatron joins documents: one after the other, the last token of a window the first of the next.  It shuffles
    them; here they are in their order, so that all seeds have the same windows.  Raises :class:`StartError` where there
    is not one whole window.
    """
    with without_announcements():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(prefix)
    sequences = split_ranges(split, len(data)).get("valid", range(0))
    tokens = numpy.concatenate([data[i] for i in sequences]) if sequences else numpy.empty(0, numpy.int64)
    number = (len(tokens) - 1) // context
    if number < 1:
        raise StartError(f"{prefix}: {len(tokens)} held-out tokens: expected more than the context of {context}")
    kept = torch.from_numpy(tokens[: number * context + 1].astype(numpy.int64))
    return kept.unfold(0, context + 1, context)


def drawn_windows(prefix: str, split: str, context: int, seed: int, samples: int, before: int) -> Tensor:
    """``[samples, context + 1]`` tokens: those of one of training's evaluations, by Megatron's own data set.

    Args:
        prefix, split, context, seed: of the run.
        samples: that each evaluation draws.
        before: evaluations before this one, which is the last.
    """
    with without_announcements():
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

    data = IndexedDataset(prefix)
    part = numpy.array(split_ranges(split, len(data))["valid"], dtype=numpy.int32)
    # Without a folder for it, the index of samples would be written beside the data.
    with tempfile.TemporaryDirectory(prefix="sla-positions-") as cache:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=context,
            blend=([prefix], None),
            split=split,
            path_to_cache=cache,
            # Of it, what a sample without masks is made with.
            tokenizer=SimpleNamespace(vocab_size=None, eod=0, pad=-1, unique_identifiers={}),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        drawn = GPTDataset(data, prefix, part, (before + 1) * samples, Split.valid, config)
        found = [drawn[i] for i in range(before * samples, (before + 1) * samples)]
    return torch.stack([torch.cat([each["tokens"], each["labels"][-1:]]) for each in found])


def exported_model(checkpoints: Path, folder: Path) -> Any:
    """The model in ``checkpoints``, exported to ``folder`` by sla-convert and loaded by transformers, in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    megatron_to_hf(open_megatron(checkpoints), folder)
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@torch.no_grad()
def losses_by_position(model: Any, windows: Tensor, batch: int) -> Tensor:
    """``[windows, context]``: the cross entropy, in nats, of each predicted token of ``windows`` ``[n, context + 1]``.

    ``batch`` windows at a time.
    """
    found = []
    with bar("  windows", len(windows), " windows", leave=False) as drawn:
        for part in windows.split(batch):
            logits = model(part[:, :-1], use_cache=False).logits
            losses = cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            found.append(losses.view(len(part), -1))
            drawn.n += len(part)
    return torch.cat(found)
