"""A checkpoint as Megatron's trainer saves it, of a model with random weights, made on the CPU in this process."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from sla_megatron.common.files import write_whole


def save_random_checkpoint(folder: Path, config: Any, seed: int = 1) -> int:
    """Write ``folder/iter_0000001`` and the tracker file; returns the model's number of parameters.

    Args:
        folder: is made.
        config: an ``SlaGPTConfig``; the Megatron model has its shape and skip-layer attention.
        seed: of the weights.
    """
    import torch

    from sla_megatron.commands.convert.architecture import argv_from_config
    from sla_megatron.commands.convert.megatron_model import args_of, build, megatron_alone

    tokenizer = ("--tokenizer-type", "NullTokenizer", "--vocab-size", str(config.vocab_size))
    with megatron_alone():
        args = args_of([*argv_from_config(config.to_dict()), *tokenizer], torch.float32)
        args.padded_vocab_size = -(-config.vocab_size // 128) * 128
        model = build(args)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        save(folder, args, model, iteration=1)
        return sum(parameter.numel() for parameter in model.parameters())


def save(folder: Path, args: Namespace, model: Any, iteration: int) -> None:
    """Write ``model``, built of ``args``, into ``folder`` as Megatron's trainer does; within ``megatron_alone``."""
    from megatron.core import dist_checkpointing
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata, generate_state_dict

    metadata = _build_sharded_state_dict_metadata(args)
    state = generate_state_dict(args, [model], None, None, None, iteration, model_sd_kwargs={"metadata": metadata})
    step = folder / f"iter_{iteration:07d}"
    step.mkdir(parents=True)
    content = {name: value for name, value in metadata.items() if name != "dp_cp_group"}
    dist_checkpointing.save(state, str(step), content_metadata=content)
    write_whole(folder / "latest_checkpointed_iteration.txt", str(iteration))
