"""The variants' cases for ``parity_worker``: what is shared and from where, with all that may lie beside it.

Every share with every source, kept and pruned, and of the other axes every two values together.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from .parity import FROM_ONE

AXES = ("share", "source", "projection", "groups", "position", "norm", "ranks", "recompute", "extra")

#: ``kv`` from a distance is the method itself, which ``test_parity.py`` has in many more combinations.  No gates where
#: rows are left out: that is refused.  No biases of key norms without rotary embedding: they add the same to all scores
#: of a query, so that their gradient is zero.
TABLE = """
values  distance  full    gqa  rope     layernorm  tp2sp  uniform2   gate
values  distance  full    mha  rope     layernorm  tp2sp  none       plain
values  distance  pruned  mha  learned  rms        tp1    block      qk-norm
keys    distance  full    gqa  rope     layernorm  tp2    selective  plain
keys    distance  pruned  gqa  rope     layernorm  tp1    uniform    plain
kv      source    full    mha  learned  rms        tp2sp  uniform    qk-norm
kv      source    pruned  gqa  rope     layernorm  tp1    block      plain
values  source    full    gqa  learned  rms        tp2    selective  gate
values  source    pruned  gqa  rope     layernorm  tp1    none       plain
keys    source    full    gqa  learned  rms        tp2    uniform2   plain
keys    source    pruned  gqa  rope     layernorm  tp1    none       qk-norm
kv      sources   full    gqa  learned  rms        tp2    block      qk-norm
kv      sources   pruned  gqa  learned  rms        tp1    uniform2   qk-norm
values  sources   full    gqa  learned  rms        tp1    uniform    gate
values  sources   pruned  mha  rope     layernorm  tp2sp  selective  plain
keys    sources   full    mha  learned  rms        tp2    block      plain
keys    sources   pruned  mha  rope     rms        tp1    none       qk-norm
kv      half      full    mha  learned  layernorm  tp1    block      plain
kv      half      pruned  gqa  rope     rms        tp1    selective  qk-norm
values  half      full    mha  learned  rms        tp2    uniform2   gate
values  half      pruned  gqa  learned  layernorm  tp2    uniform    plain
keys    half      full    mha  learned  rms        tp1    uniform2   gate
keys    half      pruned  gqa  rope     layernorm  tp2sp  none       qk-norm
kv      cla       full    gqa  learned  rms        tp2    none       gate
kv      cla       pruned  mha  learned  rms        tp2sp  uniform2   qk-norm
values  cla       full    gqa  rope     layernorm  tp2sp  selective  gate
values  cla       pruned  mha  learned  layernorm  tp1    none       plain
keys    cla       full    gqa  rope     layernorm  tp2sp  block      gate
keys    cla       pruned  gqa  rope     layernorm  tp2    uniform    qk-norm
"""

#: Of four layers; ``skip`` of four groups, and of two.  ``source``: SkipV1Former's, ``cla``: two layers share,
#: ``half``: the upper half reads one layer.
SOURCES: dict[str, dict[str, Any]] = {
    "distance": {"distances": [1], "skip": (3, 1)},
    "source": {"distances": [], "source_layers": [1], "skip": (2, 1)},
    "sources": {"distances": [], "source_layers": [1, 2], "skip": (4, 2)},
    "half": {"distances": [], "source_layers": [2], "skip": (4, 2)},
    "cla": {"distances": [1], "layers": [2, 4], "skip": (4, 2)},
}
EXTRAS = {"plain": {}, "qk-norm": {"qk_norm": True}, "gate": {"output_gate": True}}


def rows() -> list[dict[str, str]]:
    """The table, by axis."""
    return [dict(zip(AXES, line.split(), strict=True)) for line in TABLE.strip().splitlines()]


def pairs(row: dict[str, str]) -> set[frozenset[str]]:
    """Every two values of a row, each with its axis."""
    return {frozenset((f"{a} {row[a]}", f"{b} {row[b]}")) for a, b in combinations(AXES, 2)}


def case(row: dict[str, str]) -> dict[str, Any]:
    """A row as ``parity_worker`` wants it."""
    source = dict(SOURCES[row["source"]])
    of_four, of_two = source.pop("skip")
    return {
        "share": row["share"],
        "projection": row["projection"],
        "groups": 4 if row["groups"] == "mha" else 2,
        "skip_groups": of_four if row["groups"] == "mha" else of_two,
        "rope": row["position"] == "rope",
        "rms_norm": row["norm"] == "rms",
        "tp": 1 if row["ranks"] == "tp1" else 2,
        "sequence_parallel": row["ranks"] == "tp2sp",
        "recompute": row["recompute"],
        **source,
        **EXTRAS[row["extra"]],
    }


CASES = {"-".join(row.values()): case(row) for row in rows()}

EVERY_OTHER_ROTARY = {"no_rope_freq": 2, "layers_without_rope": [2, 4]}

#: What the table leaves out.
FURTHER: dict[str, dict[str, Any]] = {
    # What reads no keys of others may differ from them in rotary embedding.
    "values-every-other-rotary": {**EVERY_OTHER_ROTARY, "share": "values", "distances": [1], "skip_groups": 3},
    "offload-values-from-one": {"offload": True, **FROM_ONE},
    # The upper half projects no values, and norms keys of its own.
    "values-half-pruned-qk-norm": {
        "share": "values",
        "distances": [],
        "source_layers": [2],
        "skip_groups": 4,
        "projection": "pruned",
        "qk_norm": True,
    },
    # The source alone in its chunk, then readers that share one; the source with its first readers.
    "one-source-recompute-1": {**FROM_ONE, "recompute": "uniform", "share": "kv", "repeats": True},
    "one-source-recompute-3": {**FROM_ONE, "recompute": "uniform3", "repeats": True},
    "one-source-recompute-block": {**FROM_ONE, "recompute": "block", "share": "keys", "repeats": True},
}
