"""The models and layouts that the distributed pipeline tests share, and what the specification expects of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .runs import NO_DROPOUT

LAYERS, GROUPS, HIDDEN, SEQUENCE, MICRO_BATCH, GLOBAL_BATCH = 8, 4, 32, 16, 2, 8


@dataclass(frozen=True)
class Model:
    """A GPT of 8 layers and 4 K/V groups."""

    heads: int
    distances: tuple[int, ...]
    num_skip_groups: int
    projection: str = "full"
    flags: tuple[tuple[str, Any], ...] = ()

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
            "sla_skip_distance": list(self.distances),
            "sla_num_skip_groups": self.num_skip_groups,
            "sla_kv_projection": self.projection,
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


def skip_groups(model: Model) -> dict[int, int]:
    """Skip group -> its distance, by the specification's formula."""
    k = model.num_skip_groups
    chosen = [g for g in range(GROUPS) if (g + 1) * k // GROUPS > g * k // GROUPS]
    return {g: model.distances[j % len(model.distances)] for j, g in enumerate(chosen)}


def hop_elements(model: Model, layout: Layout, tensor_rank: int) -> list[int]:
    """The specification's lower bound for each hop, hidden states and K/V, in elements of one tensor-parallel rank."""
    stage_of = [stage for stage, size in enumerate(layout.stages) for _ in range(size)]
    share, positions = GROUPS // layout.tensor, SEQUENCE // layout.context
    hops = [positions * MICRO_BATCH * HIDDEN // layout.tensor] * (len(layout.stages) - 1)
    for group, distance in skip_groups(model).items():
        if group // share != tensor_rank:
            continue
        for source in range(len(stage_of) - distance):
            s_a, s_c = stage_of[source], stage_of[source + distance]
            for hop in range(s_a, s_a + (s_c - s_a) % layout.pipeline):
                hops[hop] += 2 * positions * MICRO_BATCH * model.head_size
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
