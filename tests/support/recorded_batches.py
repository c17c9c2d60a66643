"""A training script: ``sla_megatron.pretrain_gpt`` with its batches on record, in the file ``SLA_TEST_BATCHES``.

Each is the tokens and the labels ``[b, s]`` of one microbatch, in order.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from sla_megatron import pretrain_gpt


def main() -> None:
    batches, forward = [], GPTModel.forward

    @functools.wraps(forward)
    def recording(self: GPTModel, input_ids: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        batches.append((input_ids, labels))
        return forward(self, input_ids, *args, labels=labels, **kwargs)

    GPTModel.forward = recording
    try:
        pretrain_gpt.main()
    finally:
        GPTModel.forward = forward
        if os.environ["RANK"] == "0":
            torch.save(batches, os.environ["SLA_TEST_BATCHES"])


if __name__ == "__main__":
    main()
