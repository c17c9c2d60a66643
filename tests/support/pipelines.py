"""The models and layouts that the distributed pipeline tests share, and what the specification expects of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.reference import ReferenceGPT

from .runs import NO_DROPOUT

LAYERS, GROUPS, HIDDEN, SEQUENCE, MICRO_BATCH, GLOBAL_BATCH = 8, 4, 32, 16, 2, 8


@dataclass(frozen=True)
class Model:
    """A GPT of 8 layers and 4 K/V groups; without distances skip groups read fixed ``sources``."""

    heads: int
    distances: tuple[int, ...]
    num_skip_groups: int
    projection: str = "full"
    flags: tuple[tuple[str, Any], ...] = ()
    share: str = "kv"
    sources: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None

    @property
    def head_size(self) -> int:
        return HIDDEN // self.heads

    def argv(self) -> dict[str, Any]:
        return {
            "sla": True,
            "num_layers": LAYERS,
            "num_attention_heads": self.heads,
            "group_query_attention": True,
            "num_query_groups": GROUPS,
            "sla_skip_distance": list(self.distances) or None,
            "sla_num_skip_groups": self.num_skip_groups,
            "sla_kv_projection": self.projection,
            "sla_share": None if self.share == "kv" else self.share,
            "sla_source_layer": list(self.sources) or None,
            "sla_layers": self.layers and ",".join(map(str, self.layers)),
            **NO_DROPOUT,
            **dict(self.flags),
        }


@dataclass(frozen=True)
class Layout:
    """A split of the 8 layers over ``len(stages)`` virtual stages of ``pipeline`` ranks, and of each stage."""

    pipeline: int
    stages: tuple[int, ...]
    flags: tuple[tuple[str, Any], ...] = ()
    tensor: int = 1
    context: int = 1

    @property
    def ranks(self) -> int:
        """Of one replica of a stage: tensor- and context-parallel ranks are neighbours in Megatron's order."""
        return self.tensor * self.context

    def argv(self) -> dict[str, Any]:
        return {
            "pipeline_model_parallel_size": self.pipeline,
            "tensor_model_parallel_size": self.tensor,
            "sequence_parallel": self.tensor > 1,
            "context_parallel_size": self.context,
            # Megatron's local attention, which all other runs have, knows no context parallelism.
            "core_attention": "sdpa" if self.context > 1 else None,
            **dict(self.flags),
        }


ROPE = (("position_embedding_type", "rope"), ("normalization", "RMSNorm"), ("disable_bias_linear", True))

#: One and two distances, full and pruned, MHA and GQA, long (3L/4) and short: every pair of these.
MODELS = {
    "mha-full-long": Model(4, (6,), 3),
    "mha-pruned-two-long": Model(4, (6, 5), 4, "pruned", ROPE),
    "gqa-pruned-long": Model(8, (6,), 2, "pruned"),
    "gqa-full-long-and-short": Model(8, (6, 2), 4, flags=ROPE),
    "mha-full-short": Model(4, (1,), 2, flags=(("qk_layernorm", True),)),
    "gqa-pruned-two-short": Model(8, (1, 2), 4, "pruned"),
    "gqa-full-short": Model(8, (2,), 3, flags=ROPE),
    "mha-pruned-short": Model(4, (2,), 2, "pruned"),
}
NORMS = (("qk_layernorm", True),)
#: What is shared, and from where: layer 1's values for all others, one cache for the upper half, pairs of layers, one
#: source of which reads the other, keys alone.
VARIANTS = {
    "skipv1": Model(4, (), 2, share="values", sources=(1,)),
    "half-shared": Model(8, (), 4, "pruned", ROPE, sources=(4,)),
    "cla2": Model(8, (1,), 4, "pruned", NORMS, layers=(2, 4, 6, 8)),
    "values-two-sources": Model(4, (), 4, "pruned", ROPE, share="values", sources=(1, 3)),
    "keys": Model(8, (3, 1), 3, "pruned", NORMS, share="keys"),
}
MODELS |= VARIANTS


def _virtual(layers_each: int) -> tuple[tuple[str, Any], ...]:
    return (("num_layers_per_virtual_pipeline_stage", layers_each),)


def _custom(layout: str) -> tuple[tuple[str, Any], ...]:
    return (("pipeline_model_parallel_layout", layout),)


TWO_RANKS = {
    "pp2": Layout(2, (4, 4)),
    "pp2v2": Layout(2, (2, 2, 2, 2), _virtual(2)),
    "pp2v4": Layout(2, (1,) * 8, _virtual(1)),
    "pp2-uneven": Layout(2, (3, 5), (("decoder_first_pipeline_num_layers", 3),)),
    "pp2v2-uneven": Layout(2, (1, 3, 2, 2), _custom("Et|ttt|tt|ttL")),
    "pp2v2-empty-stages": Layout(2, (0, 5, 3, 0), _custom("E|ttttt|ttt|L")),
}

FOUR_RANKS = {
    "pp4": Layout(4, (2, 2, 2, 2)),
    "pp4v2": Layout(4, (1,) * 8, _virtual(1)),
    "pp4-uneven": Layout(
        4, (1, 3, 3, 1), (("decoder_first_pipeline_num_layers", 1), ("decoder_last_pipeline_num_layers", 1))
    ),
    "tp2pp2": Layout(2, (4, 4), tensor=2),
    "tp2pp2v2": Layout(2, (2, 2, 2, 2), _virtual(2), tensor=2),
    "cp2pp2": Layout(2, (4, 4), context=2),
    "cp2pp2v2": Layout(2, (2, 2, 2, 2), _virtual(2), context=2),
}

LAYOUTS = TWO_RANKS | FOUR_RANKS


#: What a skip group takes from its source.
SHARED = {"kv": ("key", "value"), "values": ("value",), "keys": ("key",)}


def source(model: Model, layer: int, group: int) -> int:
    """The layer whose K/V ``group`` takes in ``layer``; its own where it does not."""
    shape, settings = (LAYERS, GROUPS, GROUPS, model.head_size), (model.distances, model.num_skip_groups, model.layers)
    return ReferenceGPT(*shape, *settings, source_layers=model.sources).source(layer, group)


def hop_elements(model: Model, layout: Layout, tensor_rank: int) -> list[int]:
    """The specification's lower bound for each hop, hidden states and K/V, in elements of one tensor-parallel rank.

    Keys and values count alike.  However many layers read a group, it crosses the hops to the furthest of their ranks.
    """
    stage_of = [stage for stage, size in enumerate(layout.stages) for _ in range(size)]
    share, positions = GROUPS // layout.tensor, SEQUENCE // layout.context
    hops = [positions * MICRO_BATCH * HIDDEN // layout.tensor] * (len(layout.stages) - 1)
    for group in range(tensor_rank * share, (tensor_rank + 1) * share):
        for s_a, made in zip(stage_of, range(1, len(stage_of) + 1), strict=True):
            readers = [layer for layer in range(made + 1, len(stage_of) + 1) if source(model, layer, group) == made]
            away = [(stage_of[layer - 1] - s_a) % layout.pipeline for layer in readers]
            for hop in range(s_a, s_a + max(away, default=0)):
                hops[hop] += len(SHARED[model.share]) * positions * MICRO_BATCH * model.head_size
    return hops


def expected_wire(
    model: Model, layout: Layout, pipeline_rank: int, tensor_rank: int, num_microbatches: int, forward_only: bool
) -> dict[str, dict[str, Counter[int]]]:
    """How often a rank sends and receives a tensor of how many elements, in one run of a schedule."""
    hops = hop_elements(model, layout, tensor_rank)
    mine = [hop for hop in range(len(hops)) if hop % layout.pipeline == pipeline_rank]
    before = [hop for hop in range(len(hops)) if (hop + 1) % layout.pipeline == pipeline_rank]
    after, ahead = ([], []) if forward_only else (mine, before)

    def counted(chosen: list[int]) -> Counter[int]:
        return Counter({size: n * num_microbatches for size, n in Counter(hops[hop] for hop in chosen).items()})

    return {
        "sent": {"next": counted(mine), "prev": counted(ahead)},
        "received": {"prev": counted(before), "next": counted(after)},
    }
