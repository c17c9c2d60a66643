"""A GPT's checkpoint is loaded into a hybrid model, and a hybrid model's into a GPT: layer ``i`` of the one is the
``i``-th attention and the ``i``-th MLP of the other.

Upstream does the first, for checkpoints that hold all layers as one tensor.  Here is what it cannot: checkpoints whose
layers are numbered, since they differ (``--sla-kv-projection pruned``, experts in some layers), and the way back.  As
there, the files stay as they are: what this run asks them for is renamed, its weights and its optimizer's state alike.
"""

from __future__ import annotations

import functools
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from ..common.errors import FlagError, flag_of
from ..common.layer_pairs import LayerPairs
from ..common.patterns import EXPERTS, MLP, kinds
from ..upstream.adapters.checkpoint_interop import has_checkpoint_interop
from ..upstream.seams import Wrapping, wrap_once
from .asked import hybrid_pattern

#: What a hybrid model stores and a GPT does not: nothing, in a place of its own.
NOT_IN_GPTS = "output_layer._extra_state"


def mlp_kinds(args: Namespace) -> str:
    """What each layer of a GPT has beside its attention, ``-`` or ``E``; ``args`` may be a checkpoint's."""
    if not getattr(args, "num_experts", None):
        return MLP * args.num_layers
    frequency = getattr(args, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        return "".join(MLP if layer % frequency else EXPERTS for layer in range(args.num_layers))
    return "".join(EXPERTS if among else MLP for among in frequency)


def stores_numbered_layers(args: Namespace) -> bool:
    """Whether the checkpoint of a GPT holds each layer under a number of its own.

    Upstream: ``TransformerBlock.sharded_state_dict``, by what the builder of a pruned model and ``--moe-layer-freq``
    set.
    """
    frequency = getattr(args, "moe_layer_freq", 1)
    is_pruned = getattr(args, "sla", False) and args.sla_kv_projection == "pruned"
    return is_pruned or isinstance(frequency, list) or frequency > 1


@dataclass(frozen=True)
class Across:
    """How names of one kind of model are found in a checkpoint of the other, where upstream does not do it.

    Attributes:
        pairs: the layers.
        into_hybrid: whether the run is the hybrid model; else it is the GPT.
    """

    pairs: LayerPairs
    into_hybrid: bool

    @classmethod
    def of(cls, args: Namespace, saved: Namespace) -> Across | None:
        """For a run of ``args`` that loads a checkpoint of ``saved``; ``None`` where upstream's own loading will do."""
        ours, theirs = hybrid_pattern(args), hybrid_pattern(saved)
        if bool(ours) == bool(theirs) or (ours and not stores_numbered_layers(saved)):
            return None
        return cls(LayerPairs.of(ours or theirs), bool(ours))

    def retarget(self, state: Any) -> None:
        """Have each entry of ``state``, a sharded dictionary of a model or its optimizer, ask for what is stored.

        In place.  Only what is looked for changes, not the names under which the run takes it.
        """
        dict_list_map_inplace(self._to_gpt if self.into_hybrid else self._to_stack, state)

    def _to_gpt(self, entry: Any) -> Any:
        """An entry of a hybrid model, which numbers all layers, as a GPT that numbers them stores it."""
        if not isinstance(entry, ShardedBase):
            return entry
        name = self.pairs.to_gpt(entry.key)
        if name is None or entry.key.endswith(NOT_IN_GPTS):
            return LocalNonpersistentObject(entry.data)
        entry.key = name
        return entry

    def _to_stack(self, entry: Any) -> Any:
        """An entry of a GPT, with a number or with an axis of layers, as a hybrid model stores it."""
        if not isinstance(entry, ShardedBase):
            return entry
        if ".layers." not in entry.key or _is_numbered(entry.key):
            entry.key = self.pairs.to_stack(entry.key)
        elif isinstance(entry, ShardedTensorFactory):
            # What it builds knows its layer; as upstream's _prepend_gpt_layer_axis.
            entry.build_fn = self._building(entry.build_fn)
        else:
            entry.key = self.pairs.to_stack(entry.key, entry.global_offset[0])
            _drop_layer_axis(entry)
        return entry

    def _building(self, build: Callable[..., Any]) -> Callable[..., Any]:
        def built_for_stack(*args: Any, **kwargs: Any) -> Any:
            built = build(*args, **kwargs)
            dict_list_map_inplace(self._to_stack, built)
            return built

        return built_for_stack


def _is_numbered(name: str) -> bool:
    return name.rpartition("decoder.layers.")[2].partition(".")[0].isdecimal()


def _drop_layer_axis(entry: ShardedTensor | ShardedObject) -> None:
    """Undo what upstream does for layers that are stored as one tensor, whose axis of layers is the first."""
    entry.global_shape, entry.global_offset = entry.global_shape[1:], entry.global_offset[1:]
    if isinstance(entry, ShardedTensor):
        entry.axis_fragmentations = entry.axis_fragmentations[1:]
        entry.prepend_axis_num -= 1
    elif not entry.global_shape:
        # Of an object that is not sharded: upstream's _get_extra_state_offsets.
        entry.global_shape, entry.global_offset = (1,), (0,)


def _setup(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def setup(args: Namespace, ckpt_args: Namespace, model: Any) -> tuple[Any, bool]:
        across = Across.of(args, ckpt_args)
        if across is None:
            return original(args, ckpt_args, model)
        return across, not (args.no_load_optim or getattr(ckpt_args, "no_save_optim", False))

    return setup


def _retarget(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def retarget(sharded_state_dict: Any, layer_maps: Any) -> None:
        if isinstance(layer_maps, Across):
            layer_maps.retarget(sharded_state_dict)
        else:
            original(sharded_state_dict, layer_maps)

    return retarget


#: Together: the first one's answer is what the second gets.
ACROSS_KINDS = (
    Wrapping(
        "megatron.training.checkpointing:_maybe_setup_gpt_to_hybrid_load",
        "says how the layers of a checkpoint of the other kind are found; ours, where upstream's are not",
        ("args", "ckpt_args", "model"),
        wrap=_setup,
        sources={"2347cabda1a14445": "0.19.0 to 0.19.2", "d187bd7c8872c430": "main at d98e8a64"},
    ),
    Wrapping(
        "megatron.core.dist_checkpointing.gpt_checkpoint_interop:retarget_sharded_state_dict_to_gpt_checkpoint",
        "renames what a run asks a checkpoint of the other kind for; by our rule, where it is not upstream's",
        ("sharded_state_dict", "layer_maps"),
        wrap=_retarget,
        sources={"4bebb4f65786c057": "0.19.0 to 0.19.2, and main at d98e8a64"},
    ),
)


def adopt_layers(args: Namespace, saved: Namespace) -> None:
    """Undo, in place, what ``--use-checkpoint-args`` takes of a GPT's checkpoint and ``args``' own pattern says."""
    if hybrid_pattern(args) and not hybrid_pattern(saved):
        args.num_layers, args.moe_layer_freq = None, 1


def load_across_kinds(args: Namespace, saved: Namespace, load_arg: str = "load") -> None:
    """See to it that a run of ``args`` can load a checkpoint of ``saved``, where one is a GPT, the other hybrid.

    Nothing is touched where both are of one kind, or upstream's own loading will do.

    Args:
        args: settled.
        saved: the arguments that the checkpoint holds.
        load_arg: which of ``args`` names it.

    Raises:
        FlagError: where the layers are not each other's, or Megatron cannot load them.
    """
    ours, theirs = hybrid_pattern(args), hybrid_pattern(saved)
    if ours and theirs and kinds(ours) != kinds(theirs):
        raise FlagError("--hybrid-layer-pattern", ours, f"the layers of {theirs}, as in the checkpoint that is loaded")
    if bool(ours) == bool(theirs):
        return
    flag, path = flag_of(load_arg), getattr(args, load_arg)
    if not has_checkpoint_interop():
        kind, command = ("hybrid", "hybrid-to-gpt") if theirs else ("GPT", "gpt-to-hybrid")
        raise FlagError(
            flag, path, f"no {kind}'s checkpoint with this Megatron, but what sla-convert {command} makes of it"
        )
    pairs = _paired(args, saved, flag, path)
    _refuse_unreadable(args, saved, flag, path)
    if not pairs.alternate and os.environ.get("RANK", "0") == "0":
        print(
            f"sla-megatron: warning: in {ours or theirs} not every attention is followed by its MLP: the weights of "
            f"{path} fit, but the model is another function than theirs",
            flush=True,
        )
    if Across.of(args, saved) is not None:
        wrap_once(ACROSS_KINDS)


def _paired(args: Namespace, saved: Namespace, flag: str, path: str) -> LayerPairs:
    """The layers of the hybrid side, which are those of the GPT.  Raises :class:`FlagError` where they are not."""
    ours, theirs = hybrid_pattern(args), hybrid_pattern(saved)
    gpt = saved if ours else args
    try:
        pairs = LayerPairs.of(ours or theirs)
    except ValueError as error:
        named = ("--hybrid-layer-pattern", ours) if ours else (flag, path)
        raise FlagError(*named, f"{error}, to be loaded across kinds of models") from None
    if ours:
        if pairs.mlp_kinds != mlp_kinds(gpt):
            raise FlagError(
                "--hybrid-layer-pattern",
                ours,
                f"an attention layer (*) and an MLP (-, E) for each of {mlp_kinds(gpt)}, the GPT's in {path}",
            )
        if getattr(saved, "mtp_num_layers", None) and not args.finetune:
            raise FlagError(flag, path, "a GPT without --mtp-num-layers, or --finetune, to leave these layers behind")
        return pairs
    if pairs.alone:
        raise FlagError(flag, path, f"a checkpoint of attention and MLPs alone for a GPT; {theirs} has Mamba layers")
    if len(pairs.mlp_kinds) != args.num_layers:
        raise FlagError("--num-layers", args.num_layers, f"{len(pairs.mlp_kinds)}, as {theirs} in {path} has pairs of")
    if pairs.mlp_kinds != mlp_kinds(gpt):
        raise FlagError(
            flag,
            path,
            f"a checkpoint of the MLPs (-, E) {mlp_kinds(gpt)}; those of {theirs} are {pairs.mlp_kinds}",
        )
    if args.mtp_num_layers:
        raise FlagError("--mtp-num-layers", args.mtp_num_layers, f"none: the hybrid model in {path} has no such layers")
    return pairs


def _refuse_unreadable(args: Namespace, saved: Namespace, flag: str, path: str) -> None:
    """Raise :class:`FlagError` for ways to store weights and optimizer that cannot be read by another model."""
    if Across.of(args, saved) is not None and args.ckpt_format != "torch_dist":
        raise FlagError("--ckpt-format", args.ckpt_format, f"torch_dist, to load {path} into another kind of model")
    is_by_buffers = getattr(saved, "use_distributed_optimizer", False) and not getattr(
        saved, "dist_ckpt_optim_fully_reshardable", True
    )
    loads = not (args.no_load_optim or getattr(saved, "no_save_optim", False))
    if is_by_buffers and args.use_distributed_optimizer and loads:
        raise FlagError(
            flag,
            path,
            "a checkpoint saved with --dist-ckpt-optim-fully-reshardable, or --no-load-optim beside it: another kind "
            "of model lays the optimizer's buffers out otherwise",
        )
