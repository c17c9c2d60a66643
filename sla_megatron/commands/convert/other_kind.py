"""A GPT's checkpoint as a hybrid model's, and back: the same tensors under the other kind's names.

Any tensor of an attention, an MLP or experts comes along as it is stored, whatever wrote it: nothing is built.  What
``--load`` does while it loads (``flags/gpt_hybrid_load.py``) is here done once, for a Megatron that cannot, or to have
the files.
"""

from __future__ import annotations

import copy
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ...common.errors import last_line
from ...common.layer_pairs import LayerPairs, split_layer
from ...common.patterns import MLP, kinds
from ...common.tokenizers import CARRIED
from ...flags.asked import hybrid_pattern
from ...flags.gpt_hybrid_load import NOT_IN_GPTS, mlp_kinds, stores_numbered_layers
from ...training.checkpoint_writer import results_here
from ...upstream.seams import replaced
from .checkpoint_arguments import stored_args
from .errors import ConvertError
from .megatron_model import CONTENT, megatron_alone
from .megatron_reader import TRACKER, checkpoint_folder, stored_metadata, stored_tensors
from .megatron_writer import RELEASE
from .output import finished_folder
from .progress import progress

# Of the run that wrote the checkpoint: how its layers were shared out, and how far it had come.
_FORGOTTEN: Mapping[str, Any] = {
    "pipeline_model_parallel_layout": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "virtual_pipeline_model_parallel_size": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "iteration": 0,
    "consumed_train_samples": 0,
    "skipped_train_samples": 0,
    "consumed_valid_samples": 0,
    "no_save_optim": True,
    # Layers of the kind that it was.
    "spec": None,
    "hybrid_override_pattern": None,
}


def gpt_to_hybrid(path: Path, out: Path, pattern: str, overwrite: bool = False) -> None:
    """Write the GPT in ``path`` as a hybrid model of ``pattern``: a checkpoint that ``--load`` starts from.

    Memory: the model.

    Raises:
        ConvertError: for what is no GPT's checkpoint, or has other layers than the pattern.
    """
    folder = checkpoint_folder(path)
    args = stored_args(folder)
    if hybrid_pattern(args):
        raise ConvertError(f"{folder}: a hybrid model's checkpoint ({hybrid_pattern(args)}): expected a GPT's")
    pairs = _pairs("--hybrid-layer-pattern", pattern)
    if pairs.mlp_kinds != mlp_kinds(args):
        raise ConvertError(
            f"--hybrid-layer-pattern {pattern}: expected an attention layer (*) and an MLP (-, E) for each of "
            f"{mlp_kinds(args)}, those of {folder}"
        )
    if not pairs.alternate:
        print(
            f"sla-convert: warning: in {pattern} not every attention is followed by its MLP: the weights fit, but the "
            "model is another function",
            file=sys.stderr,
        )
    its = copy.copy(args)
    vars(its).update(
        _FORGOTTEN | {"hybrid_layer_pattern": pattern, "num_layers": len(kinds(pattern)), "moe_layer_freq": 1}
    )
    _write(folder, args, out, overwrite, its, pairs, into_hybrid=True)


def hybrid_to_gpt(path: Path, out: Path, overwrite: bool = False) -> None:
    """The reverse.  Likewise."""
    folder = checkpoint_folder(path)
    args = stored_args(folder)
    pattern = hybrid_pattern(args)
    if not pattern:
        raise ConvertError(f"{folder}: a GPT's checkpoint: expected a hybrid model's")
    pairs = _pairs(f"{folder}: --hybrid-layer-pattern", pattern)
    if not pairs.alternate:
        raise ConvertError(f"{folder}: --hybrid-layer-pattern {pattern}: layers do not pair up as those of a GPT do")
    are_experts = [int(kind != MLP) for kind in pairs.mlp_kinds]
    its = copy.copy(args)
    changed = {"hybrid_layer_pattern": None, "num_layers": len(are_experts)}
    changed["moe_layer_freq"] = 1 if len(set(are_experts)) == 1 else are_experts
    vars(its).update(_FORGOTTEN | changed)
    _write(folder, args, out, overwrite, its, pairs, into_hybrid=False)


def _pairs(where: str, pattern: str) -> LayerPairs:
    try:
        pairs = LayerPairs.of(pattern)
    except ValueError as error:
        raise ConvertError(f"{where} {pattern}: expected {error}") from error
    if pairs.alone:
        raise ConvertError(f"{where} {pattern}: expected attention and MLPs alone: a GPT has no Mamba layers (M)")
    return pairs


def _write(
    folder: Path, args: Namespace, out: Path, overwrite: bool, its: Namespace, pairs: LayerPairs, into_hybrid: bool
) -> None:
    """Write the tensors of ``folder``, whose arguments are ``args``, for a model of the arguments ``its``."""
    if getattr(args, "mtp_num_layers", None):
        raise ConvertError(
            f"{folder}: --mtp-num-layers {args.mtp_num_layers}: layers that predict further tokens have no place in a "
            "checkpoint of the other kind"
        )
    tensors = stored_tensors(folder).values()
    total = sum(stored.size.numel() * stored.properties.dtype.itemsize for stored in tensors)
    with finished_folder(out, overwrite, [folder]) as place, progress(out, place, total), megatron_alone():
        from megatron.core import dist_checkpointing

        named = _in_stack(folder, pairs) if into_hybrid else _in_gpt(folder, pairs, stores_numbered_layers(its))
        state = {
            "args": its,
            "checkpoint_version": 3.0,
            "iteration": 0,
            "num_floating_point_operations_so_far": 0,
            "model": {f"{entry.key} {entry.global_offset}": entry for entry in named},
        }
        release = place / RELEASE
        release.mkdir()
        with replaced([results_here()]):
            dist_checkpointing.save(state, str(release), content_metadata=dict(CONTENT))
        if (folder / CARRIED).is_dir():
            shutil.copytree(folder / CARRIED, release / CARRIED)
        (place / TRACKER).write_text(RELEASE)


def _stored(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Each tensor and object of the model in ``folder``: as Megatron asks for all of it, and its data."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    wanted: dict[str, Any] = {}
    # Megatron's own listing does not know all that a new torch says of a tensor.
    for key, stored in stored_metadata(folder).items():
        if isinstance(stored, TensorStorageMetadata):
            whole = torch.empty(stored.size, dtype=stored.properties.dtype)
            wanted[key] = ShardedTensor.from_rank_offsets(key, whole)
        else:
            wanted[key] = ShardedObject.empty_from_unique_key(key)
    try:
        loaded = dist_checkpointing.load(dict(wanted), str(folder))
    except (Exception, CheckpointException) as error:
        raise ConvertError(f"{folder} cannot be read: {last_line(error)}") from error
    for key, entry in wanted.items():
        yield entry, loaded[key]


def _in_stack(folder: Path, pairs: LayerPairs) -> Iterator[Any]:
    """A GPT's tensors as a hybrid model stores them: every layer under a number of its own."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    # Nothing, which a GPT does not store.
    yield ShardedObject(NOT_IN_GPTS, None, (1,), (0,))
    for entry, data in _stored(folder):
        name, layer = split_layer(entry.key)
        if layer is not None or "decoder.layers." not in name:
            yield _named(entry, pairs.to_stack(entry.key), data, entry.global_shape, entry.global_offset)
        elif _is_object(entry):
            # One for each layer.
            shape, offset = entry.global_shape[1:] or (1,), entry.global_offset[1:] or (0,)
            yield _named(entry, pairs.to_stack(name, entry.global_offset[0]), data, shape, offset)
        else:
            for index, of_layer in enumerate(data):
                yield _named(entry, pairs.to_stack(name, index), of_layer, of_layer.shape, (0,) * of_layer.dim())


def _in_gpt(folder: Path, pairs: LayerPairs, numbered: bool) -> Iterator[Any]:
    """A hybrid model's tensors as a GPT stores them: with numbers, or as one tensor of all layers."""
    count = len(pairs.attention)
    for entry, data in _stored(folder):
        if entry.key == NOT_IN_GPTS:
            continue
        key = pairs.to_gpt(entry.key)
        name, layer = split_layer(key)
        if numbered or layer is None:
            yield _named(entry, key, data, entry.global_shape, entry.global_offset)
        elif _is_object(entry):
            is_whole = entry.global_shape == (1,)
            shape, offset = ((), ()) if is_whole else (entry.global_shape, entry.global_offset)
            yield _named(entry, name, data, (count, *shape), (layer, *offset))
        else:
            yield _named(entry, name, data, (count, *data.shape), (layer, *(0,) * data.dim()))


def _is_object(entry: Any) -> bool:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return isinstance(entry, ShardedObject)


def _named(entry: Any, key: str, data: Any, shape: tuple[int, ...], offset: tuple[int, ...]) -> Any:
    """``data`` under ``key``, at ``offset`` of what has ``shape``; ``entry`` is what it was stored as."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    if _is_object(entry):
        return ShardedObject(key, data, tuple(shape), tuple(offset))
    layers = len(shape) - data.dim()
    offsets = [(0, offset[0], shape[0])] if layers else []
    return ShardedTensor.from_rank_offsets(key, data.contiguous(), *offsets, prepend_axis_num=layers)
