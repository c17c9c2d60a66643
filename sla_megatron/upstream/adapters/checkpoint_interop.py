"""Whether Megatron loads the checkpoint of a GPT into a hybrid model (upstream's #5792).

0.19 and 0.20 do.  dev, which lacks that change, does not: there a checkpoint is converted first.
"""

from __future__ import annotations

import importlib.util


def has_checkpoint_interop() -> bool:
    """Whether there is a module for it."""
    return importlib.util.find_spec("megatron.core.dist_checkpointing.gpt_checkpoint_interop") is not None
