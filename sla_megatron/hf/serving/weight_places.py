"""Where the tensors of an export go in vLLM's model, whose heads have the order of ``cache_plan.py``."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..configuration_sla_gpt import SlaGPTConfig
from ..sharing_sla_gpt import KINDS
from .cache_plan import plan_layers, rank_groups

#: Letter of a projection's name -> what it projects.
KIND_OF = {kind[0]: kind for kind in KINDS}


class WeightPlaces:
    """Where an export's tensors go: names of merged projections, and rows in the order of calls and caches.

    All ranks' rows, rank by rank, of which vLLM's loaders take the rank's own.

    Args:
        ranks: the tensor-parallel size.
    """

    def __init__(self, config: SlaGPTConfig, ranks: int) -> None:
        self.config = config
        self.plans = [plan_layers(config, groups) for groups in rank_groups(config, ranks)]

    def of(self, name: str) -> tuple[str, int | None, Tensor | None, int] | None:
        """Our name, the part of a merged projection, and which indices are taken, of which dimension.

        ``None`` for a tensor that nobody reads.
        """
        if match := re.fullmatch(r"(model\.layers\.(\d+)\.self_attn\.)([qkvo])_(proj|norm)(\.\w+)", name):
            start, layer, kind, what, end = match.groups()
            index = int(layer)
            plan = self.plans[0][index]
            if kind in "kv" and not plan.projected(KIND_OF[kind]):
                return None
            if what == "norm" or (kind == "o" and end == ".bias"):
                return name, None, None, 0
            if kind == "o":
                return name, None, self._rows(index, "q"), 1
            merged = ["q", *(short for short, of in KIND_OF.items() if plan.projected(of))]
            return f"{start}qkv_proj{end}", merged.index(kind), self._rows(index, kind), 0
        if match := re.fullmatch(r"(model\.layers\.\d+\.mlp\.)(gate|up)_proj(\.\w+)", name):
            start, kind, end = match.groups()
            return f"{start}gate_up_proj{end}", int(self.config.gated_mlp and kind == "up"), None, 0
        return name, None, None, 0

    def _rows(self, index: int, kind: str) -> Tensor:
        config = self.config
        plans = [rank[index] for rank in self.plans]
        if kind == "q":
            groups = [g for plan in plans for call in plan.calls for g in call]
            width = config.num_attention_heads // config.num_key_value_heads * config.head_dim
        else:
            stored = config.projected_groups(index + 1, KIND_OF[kind])
            groups = [stored.index(g) for plan in plans for part in plan.projected(KIND_OF[kind]) for g in part]
            width = config.head_dim
        return torch.tensor([group * width + i for group in groups for i in range(width)], dtype=torch.long)
