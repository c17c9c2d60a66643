"""A configuration's fields of rotary embedding: transformers 5's ``rope_parameters``, and our three that say the same.

This file goes into exported folders: it needs transformers and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

#: Kind of rotary embedding -> the fields that it needs, all positive numbers.  transformers computes with them, and
#: with more that have defaults there.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": (),
}
#: Those that the transformers at hand has.
ROPE_KINDS = [kind for kind in ROPE_FIELDS if kind == "default" or kind in ROPE_INIT_FUNCTIONS]

#: What ``rope_parameters`` holds of every kind, and its values where they are not given.
_ALWAYS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}


class RopeFields:
    """``rope_parameters``, and ``rope_theta``, ``rotary_percent`` and ``rope_scaling``, which all our exports have.

    There is one dictionary of values: who changes them by one name has changed them by the other.
    """

    _rope: dict[str, Any]

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """``rope_type``, ``rope_theta``, ``partial_rotary_factor`` and the fields of the type."""
        return self._rope

    @rope_parameters.setter
    def rope_parameters(self, value: Mapping[str, Any] | None) -> None:
        self._set_scaling("rope_parameters", value, "default")

    @property
    def rope_scaling(self) -> Mapping[str, Any] | None:
        """``rope_type`` and its fields, not to be written into; ``None`` where nothing scales."""
        if self._rope.get("rope_type", "default") == "default":
            return None
        beside = ("rope_theta", "partial_rotary_factor")
        return MappingProxyType({name: value for name, value in self._rope.items() if name not in beside})

    @rope_scaling.setter
    def rope_scaling(self, value: Mapping[str, Any] | None) -> None:
        self._set_scaling("rope_scaling", value, "default" if value is None else None)

    @property
    def rope_theta(self) -> float:
        """The base of the angles."""
        return self._rope.get("rope_theta", _ALWAYS["rope_theta"])

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self._rope["rope_theta"] = value

    @property
    def rotary_percent(self) -> float:
        """The share of each head, from its start, that rotary embedding turns."""
        return self._rope.get("partial_rotary_factor", _ALWAYS["partial_rotary_factor"])

    @rotary_percent.setter
    def rotary_percent(self, value: float) -> None:
        self._rope["partial_rotary_factor"] = value

    partial_rotary_factor = rotary_percent

    @property
    def rotary_dim(self) -> int:
        """How many elements of each head rotary embedding turns; the others of ``proportional`` by no angle."""
        return int(self.head_dim * self.rotary_percent)

    def _set_scaling(self, name: str, value: Mapping[str, Any] | None, kind: str | None) -> None:
        """Theta and percentage stay where ``value`` does not name them; ``kind`` is of one that names no type."""
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"SlaGPTConfig: {name} must be None or a dict; it is {value!r}")
        given = dict(value or {})
        # By the name that it had before.
        given.setdefault("rope_type", given.pop("type", kind))
        self._rope = {"rope_theta": self.rope_theta, "partial_rotary_factor": self.rotary_percent} | given

    def _take_rope(self, fields: dict[str, Any]) -> None:
        """Set them from what a configuration is made of, and take them out of it.

        Raises:
            ValueError: where two of them say different things.
        """
        self._rope = dict(_ALWAYS)
        names = ("rope_theta", "rotary_percent", "partial_rotary_factor", "rope_scaling", "rope_parameters")
        given = {name: fields.pop(name, None) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        meant: dict[str, Any] = {}
        for name, value in given.items():
            setattr(self, name, value)
            for other, before in meant.items():
                if getattr(self, other) != before:
                    raise ValueError(
                        f"SlaGPTConfig: {other} must not contradict {name} {value!r}; it is {given[other]!r}"
                    )
            meant[name] = getattr(self, name)

    def _rope_to_dict(self, fields: dict[str, Any]) -> dict[str, Any]:
        """``fields`` as they are written: the four in the place of what holds their values here."""
        rope = fields.pop("_rope")
        fields |= {"rope_theta": self.rope_theta, "rotary_percent": self.rotary_percent}
        if self.rope_scaling is not None:
            fields["rope_scaling"] = dict(self.rope_scaling)
        # Where there is one, others take a model for one of rotary positions.
        return fields if self.position_embedding_type != "rope" else fields | {"rope_parameters": rope}

    def _check_rope(self) -> None:
        theta, share = self.rope_theta, self.rotary_percent
        self._require(_is_positive(theta), "rope_theta", "a positive number")
        self._require(_is_positive(share) and share <= 1, "rotary_percent", "a number in (0, 1]")
        rotary_dim = self.rotary_dim
        self._require(
            rotary_dim > 0 and rotary_dim % 2 == 0,
            "rotary_percent",
            f"a share of head_dim={self.head_dim} that is an even number of elements",
        )
        *kinds, last = ROPE_KINDS
        wanted = f"a dict with rope_type {', '.join(kinds)} or {last} and its factors, positive numbers"
        rope = self._rope
        kind = rope.get("rope_type", "default")
        # A dict in it is another kind of layer's, which this model has not.
        known = kind in ROPE_KINDS and not any(isinstance(value, dict) for value in rope.values())
        self._require(known, "rope_parameters", wanted)
        values = [rope.get(name) for name in ROPE_FIELDS[kind]]
        if kind == "longrope":
            for name in ("short_factor", "long_factor"):
                factors = rope.get(name)
                is_long = isinstance(factors, list) and len(factors) == rotary_dim // 2
                self._require(is_long, "rope_parameters", f"a dict whose {name} is a list of {rotary_dim // 2} numbers")
                values += factors
        self._require(all(map(_is_positive, values)), "rope_parameters", wanted)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
