"""Write a torch_dist checkpoint that Megatron's trainer starts from: weights and arguments, marked as a release.

Megatron's own model says what is to be saved, and its own function saves it, so that keys, shapes and extra state are
those of a training run, for any layer spec and any sharding.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ...common.errors import flag_of
from ...flags import rope_scaling
from ...training.checkpoint_writer import results_here
from ...upstream.seams import replaced
from .architecture import argv_from_config
from .megatron_model import CONTENT, args_of, build, filled, megatron_alone
from .megatron_reader import TRACKER
from .source import Source

#: The folder of a checkpoint that no training wrote.
RELEASE = "release"
#: Megatron's default: rows of the vocabulary are padded to a multiple of it.
VOCABULARY_MULTIPLE = 128


def write_megatron(
    source: Source, folder: Path, dtype: torch.dtype, tokenizer: Namespace, extra_flags: Sequence[str] = ()
) -> Namespace:
    """Write ``folder/release`` and the tracker file that names it; returns the arguments stored with it.

    Args:
        source: the weights.
        folder: exists and is empty.
        dtype: of the stored weights.
        tokenizer: its settings, which are stored too.
        extra_flags: Megatron's.
    """
    with megatron_alone(), replaced([results_here()]), _one_thread():
        from megatron.core import dist_checkpointing

        rows = vocabulary_rows(source)
        args = args_of([*argv_from_config(source.config), *_flags(tokenizer), *extra_flags], dtype)
        for name, value in vars(tokenizer).items():
            setattr(args, name, value)
        args.padded_vocab_size = rows
        if args.use_rope_scaling:
            setattr(args, rope_scaling.HONOURED, True)
        model = build(args)
        state = {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 0,
            "num_floating_point_operations_so_far": 0,
            "model": filled(model, source, rows, args),
        }
        release = folder / RELEASE
        release.mkdir()
        dist_checkpointing.save(state, str(release), content_metadata=dict(CONTENT))
    (folder / TRACKER).write_text(RELEASE)
    return args


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several wait for each other, at full speed, where there is nothing to be done but copying."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _flags(tokenizer: Namespace) -> list[str]:
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size")
    given = {name: getattr(tokenizer, name) for name in names}
    return [text for name, value in given.items() if value for text in (flag_of(name), str(value))]


def vocabulary_rows(source: Source) -> int:
    """Rows of Megatron's vocabulary tensors: as many as were cut, or up to the next multiple of Megatron's default."""
    size = source.config["vocab_size"]
    padding = source.padding("model.embed_tokens.weight")
    if padding is not None:
        return size + len(padding)
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
