"""The MLP's width with which a run that leaves out K/V projections has the dense run's parameters again.

Read off the flags, so that a grid needs neither torch nor Megatron; ``settle`` has Megatron check what was read.  What
a run has is counted from its model, and is in its row.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from ...attention.sla_config import SLAConfig
from .errors import GridError

#: With these, layers are of several kinds, and no one width makes up for what is left out.
_REFUSED = ("--num-experts", "--hybrid-layer-pattern", "--hybrid-override-pattern")


@dataclass(frozen=True)
class Widths:
    """What parameters of a layer are counted with.

    Attributes:
        hidden_size, kv_channels: ``kv_channels`` is the head size.
        ffn_hidden_size: the dense model's.
        gated: whether the MLP has two projections up.
        mlp_bias, qkv_bias: whether there are biases.
        key_norm: parameters of a layer's norm of keys; 0 without one.
        ranks: of tensor parallelism, which share the MLP's width out evenly.
    """

    hidden_size: int
    kv_channels: int
    ffn_hidden_size: int
    gated: bool
    mlp_bias: bool
    qkv_bias: bool
    key_norm: int
    ranks: int

    @classmethod
    def of_flags(cls, key: str, flags: Sequence[str], num_heads: int) -> Widths:
        """Of all flags of a dense run; of a flag that comes twice the later counts.

        Raises:
            GridError: naming ``key``, for models whose layers differ, and for a width that the flags leave open.
        """
        for word in flags:
            if word.partition("=")[0] in _REFUSED:
                raise GridError(key, "dense", f"a GPT without {word.partition('=')[0]}")
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("hidden-size", "ffn-hidden-size", "kv-channels"):
            parser.add_argument(f"--{name}", nargs="?", const="")
        for name in ("swiglu", "disable-bias-linear", "add-qkv-bias", "qk-layernorm", "qk-l2-norm"):
            parser.add_argument(f"--{name}", action="store_true")
        parser.add_argument("--normalization", nargs="?", const="", default="LayerNorm")
        parser.add_argument("--tensor-model-parallel-size", nargs="?", const="", default="1")
        found, _ = parser.parse_known_args(list(flags))
        hidden = _count(key, "--hidden-size", found.hidden_size)
        if found.swiglu and found.ffn_hidden_size is None:
            raise GridError(key, "dense", "--ffn-hidden-size beside --swiglu, whose default is rounded")
        return cls._of(
            hidden,
            hidden // num_heads if found.kv_channels is None else _count(key, "--kv-channels", found.kv_channels),
            4 * hidden if found.ffn_hidden_size is None else _count(key, "--ffn-hidden-size", found.ffn_hidden_size),
            not found.disable_bias_linear,
            _count(key, "--tensor-model-parallel-size", found.tensor_model_parallel_size),
            found,
        )

    @classmethod
    def of_args(cls, args: Namespace) -> Widths:
        """Of Megatron's arguments, which are settled."""
        widths = (args.hidden_size, args.kv_channels, args.ffn_hidden_size)
        return cls._of(*widths, args.add_bias_linear, args.tensor_model_parallel_size, args)

    @classmethod
    def _of(cls, hidden: int, channels: int, ffn: int, bias: bool, ranks: int, found: Namespace) -> Widths:
        has_norm = found.qk_layernorm and not found.qk_l2_norm
        norm = channels * (2 if found.normalization == "LayerNorm" else 1) if has_norm else 0
        return cls(hidden, channels, ffn, found.swiglu, bias, bias or found.add_qkv_bias, norm, ranks)

    def widened(self, sla: SLAConfig) -> int:
        """The MLP's width with which the parameters come closest to the dense model's."""
        if sla.kv_projection != "pruned":
            return self.ffn_hidden_size
        up = 2 if self.gated else 1
        per_unit = sla.num_layers * ((up + 1) * self.hidden_size + up * int(self.mlp_bias))
        left_out = sla.dead_parameters(self.kv_channels, self.hidden_size + int(self.qkv_bias), self.key_norm)
        return round((self.ffn_hidden_size + left_out / per_unit) / self.ranks) * self.ranks


def _count(key: str, flag: str, value: str | None) -> int:
    if value is None or not value.isdecimal() or int(value) < 1:
        raise GridError(key, f"{flag} {value or ''}".strip(), "the flag with a count")
    return int(value)
