"""Hidden states and K/V as the one tensor that a schedule sends, and back.

The payload has the shape ``[s, b, h + w]``, as though K/V widened the feature dimension, so that whoever reads the
sequence length or the microbatch size off it (rotary embedding does) reads the right one.  In memory the pieces lie one
after the other, each whole: hidden states, then key and value of each bundle.  So packing is one copy, and what arrives
is contiguous where it lies.  With sequence parallelism hidden states are ``[s/T, b, h]`` and K/V still ``[s, b, groups,
d]``; only the width differs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from ..attention.roles import BundleName
from .payload import MicrobatchShape

#: Key and value of one bundle, each whole, [s, b, groups, d].
KeyAndValue = tuple[Tensor, Tensor]


def pack(hidden_states: Tensor, bundles: Sequence[KeyAndValue], shape: MicrobatchShape) -> Tensor:
    """The payload ``[s, b, h + w]``, a tensor that is no view: ``--deallocate-pipeline-outputs`` frees it once sent.

    Raises ``RuntimeError`` where a piece has not the shape that the receiver allocates for.
    """
    _require_shape("hidden states", hidden_states, shape.hidden_shape)
    for bundle in bundles:
        for tensor in bundle:
            _require_shape("keys or values", tensor, shape.kv_shape(tensor.shape[2]))
    pieces = [hidden_states, *(tensor for bundle in bundles for tensor in bundle)]
    groups = sum(key.shape[2] for key, _ in bundles)
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    return make_viewless_tensor(flat.view(shape.payload_shape(groups)), requires_grad=True, keep_graph=True)


def unpack_and_empty(
    payload: Tensor, num_groups: Mapping[BundleName, int], copied: Collection[BundleName], shape: MicrobatchShape
) -> tuple[Tensor, dict[BundleName, KeyAndValue]]:
    """Hidden states ``[s, b, h]`` and the bundles of a payload; the payload itself is left without its data.

    Autograd, and the schedule until the backward pass, hold on to the tensor that arrived.  It is therefore emptied,
    and hidden states are copied out, so that K/V that this stage only reads once or sends on are freed with its
    forward pass.

    Args:
        payload: ``[s, b, h + w]`` as received.  Its data is gone afterwards; shape, gradient and graph stay.
        num_groups: the bundles in it, in order, and each one's K/V groups.
        copied: the bundles that outlive the forward pass, which get memory of their own.
        shape: the sizes of the microbatch.
    """
    _require_shape("the payload", payload, shape.payload_shape(sum(num_groups.values())))
    kv_shapes = [shape.kv_shape(groups) for groups in num_groups.values() for _ in ("key", "value")]
    sizes = [shape.hidden_elements, *map(math.prod, kv_shapes)]
    hidden_states, *pieces = payload.view(-1).split(sizes)
    tensors = [piece.view(kv_shape) for piece, kv_shape in zip(pieces, kv_shapes, strict=True)]
    bundles = {
        name: (key.clone(), value.clone()) if name in copied else (key, value)
        for name, key, value in zip(num_groups, tensors[0::2], tensors[1::2], strict=True)
    }
    hidden_states = hidden_states.view(shape.hidden_shape).clone()
    # Every element is the same one: the shape stays true, and autograd takes the gradient as it comes.
    payload.data = payload.new_empty(1).expand(payload.shape)
    return hidden_states, bundles


def _require_shape(what: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise RuntimeError(
            f"{what} between pipeline stages: shape {tuple(tensor.shape)}, expected {expected} from --seq-length, "
            "--micro-batch-size and the model; batches of other sizes are not supported with --sla"
        )
