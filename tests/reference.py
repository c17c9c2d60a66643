"""Skip-layer attention in plain PyTorch, to compare Megatron with.  No Megatron, no code of ``sla_megatron``.

A GPT, or a hybrid model, as one function of its weights.  It follows the method's definition to the letter and nothing
else: no parallelism, no fusion, one attention head at a time.  Weights carry Megatron's names and its layout of
``linear_qkv``: group after group, ``q .. q k v``, without the key or the value that is left out; where attention has an
output gate, ``q .. q gate .. gate k v``.

Shapes: b batch, s sequence, h hidden, d head size.  Layers are numbered 1..L, groups 0..G-1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ReferenceGPT:
    """The model's shape and its skip-layer attention: with neither distances nor source layers a standard Transformer.

    ``share`` is what skip groups take from their source: keys and values ``kv``, ``values`` or ``keys`` alone.  With
    ``source_layers`` the j-th skip group reads the (j mod count)-th of them, in every later consumer layer.  With
    ``pattern`` each layer is attention ``*``, an MLP ``-`` or experts ``E`` alone, and ``num_layers`` counts those
    with attention.
    """

    num_layers: int
    num_heads: int
    num_groups: int
    head_size: int
    distances: tuple[int, ...] = ()
    num_skip_groups: int = 0
    consumer_layers: tuple[int, ...] | None = None
    pruned: bool = False
    rope: bool = False
    rotary_percent: float = 1.0
    layers_without_rope: tuple[int, ...] = ()
    rms_norm: bool = False
    swiglu: bool = False
    eps: float = 1e-5
    pattern: str = ""
    experts_per_token: int = 2
    output_gate: bool = False
    share: str = "kv"
    source_layers: tuple[int, ...] = ()

    def source(self, layer: int, group: int) -> int:
        """The layer from which ``group`` takes what it shares in ``layer``."""
        k, total = self.num_skip_groups, self.num_groups
        skip_groups = [g for g in range(total) if math.floor((g + 1) * k / total) > math.floor(g * k / total)]
        origins = self.source_layers or self.distances
        is_consumer = self.consumer_layers is None or layer in self.consumer_layers
        if not origins or group not in skip_groups or not is_consumer:
            return layer
        n = origins[skip_groups.index(group) % len(origins)]
        source = n if self.source_layers else layer - n
        return source if 1 <= source < layer else layer

    def source_of(self, layer: int, group: int, kind: str) -> int:
        """The layer whose tensor of that kind, ``key`` or ``value``, ``group`` reads in ``layer``."""
        is_shared = self.share == "kv" or self.share == kind + "s"
        return self.source(layer, group) if is_shared else layer

    def is_projected(self, layer: int, group: int, kind: str) -> bool:
        """Whether ``layer`` has weights for that tensor of ``group``: in ``pruned`` mode only if anyone reads it."""
        readers = [m for m in range(layer, self.num_layers + 1) if self.source_of(m, group, kind) == layer]
        return bool(readers) or not self.pruned

    def logits(self, w: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """``[b, s]`` tokens to ``[b, s, vocabulary]`` logits."""
        length = tokens.shape[1]
        is_later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        x = self._block(w, "decoder.", self._embedding(w, tokens), is_later)
        return x @ w.get("output_layer.weight", w["embedding.word_embeddings.weight"]).T

    def loss(self, w: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy."""
        return F.cross_entropy(self.logits(w, tokens).flatten(0, 1), labels.flatten())

    def _embedding(self, w: dict[str, Tensor], tokens: Tensor) -> Tensor:
        x = w["embedding.word_embeddings.weight"][tokens]
        return x if self.rope else x + w["embedding.position_embeddings.weight"][: tokens.shape[1]]

    def _block(self, w: dict[str, Tensor], name: str, x: Tensor, is_hidden: Tensor) -> Tensor:
        """All layers, and the norm behind the last one."""
        x = self._layers(w, name, x, is_hidden)
        return self._norm(w, name + ("final_norm" if self.pattern else "final_layernorm"), x)

    def _layers(self, w: dict[str, Tensor], name: str, x: Tensor, is_hidden: Tensor) -> Tensor:
        """All layers on ``[b, s, h]``; ``is_hidden`` (query, key) is True where the key is not to be seen."""
        projected: dict[tuple[str, int, int], Tensor] = {}
        attention = 0
        for index, kinds in enumerate(self.pattern or ["*-"] * self.num_layers):
            p = f"{name}layers.{index}."
            for kind in kinds:
                if kind == "*":
                    attention += 1
                    normed = self._norm(w, p + "input_layernorm", x)
                    x = x + self._attention(w, p, attention, normed, projected, is_hidden)
                else:
                    inner = {"-": self._mlp, "E": self._experts}[kind]
                    x = x + inner(w, p + "mlp.", self._norm(w, p + "pre_mlp_layernorm", x))
        return x

    def _attention(
        self, w: dict[str, Tensor], p: str, layer: int, x: Tensor, projected: dict, is_hidden: Tensor
    ) -> Tensor:
        p = p + "self_attention."
        d, heads_per_group = self.head_size, self.num_heads // self.num_groups
        rows = self._linear(w, p + "linear_qkv", x)
        queries, gates, start = [], [], 0
        for group in range(self.num_groups):
            for _ in range(heads_per_group):
                query = self._head_norm(w, p + "q_layernorm", rows[..., start : start + d])
                queries.append(self._position(query, layer))
                start += d
            for _ in range(heads_per_group if self.output_gate else 0):
                gates.append(rows[..., start : start + d])
                start += d
            if self.is_projected(layer, group, "key"):
                key = self._head_norm(w, p + "k_layernorm", rows[..., start : start + d])
                projected["key", layer, group] = self._position(key, layer)
                start += d
            if self.is_projected(layer, group, "value"):
                projected["value", layer, group] = rows[..., start : start + d]
                start += d
        assert start == rows.shape[-1], (start, rows.shape)

        outputs = []
        for head, query in enumerate(queries):
            group = head // heads_per_group
            key, value = (projected[kind, self.source_of(layer, group, kind), group] for kind in ("key", "value"))
            scores = query @ key.transpose(-1, -2) / math.sqrt(d)
            output = scores.masked_fill(is_hidden, -math.inf).softmax(-1) @ value
            outputs.append(output * gates[head].sigmoid() if self.output_gate else output)
        return self._linear(w, p + "linear_proj", torch.cat(outputs, dim=-1))

    def _position(self, x: Tensor, layer: int) -> Tensor:
        """Rotary embedding of ``[b, s, d]`` in ``layer``, halves rotated against each other, base 10000."""
        if not self.rope or layer in self.layers_without_rope:
            return x
        turning = round(self.head_size * self.rotary_percent)
        rotated, kept = x[..., :turning], x[..., turning:]
        half = rotated.shape[-1] // 2
        # Megatron keeps the frequencies in fp32, whatever the model's precision.
        frequency = 1.0 / 10000 ** (torch.arange(0, half, dtype=torch.float32, device=x.device) / half)
        angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float32, device=x.device), frequency).to(x.dtype)
        first, second = rotated[..., :half], rotated[..., half:]
        turned = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
        return torch.cat([*turned, kept], dim=-1)

    def _mlp(self, w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
        x = self._linear(w, p + "linear_fc1", x)
        if self.swiglu:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(x)
        return self._linear(w, p + "linear_fc2", x)

    def _experts(self, w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
        """Each token's chosen experts, weighted by the softmax of their scores alone."""
        scores = x @ w[p + "router.weight"].T
        chosen = scores.topk(self.experts_per_token, dim=-1).indices
        weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen).softmax(-1))
        outputs = [self._mlp(w, f"{p}experts.local_experts.{e}.", x) for e in range(scores.shape[-1])]
        return (torch.stack(outputs, dim=-1) * weights.unsqueeze(-2)).sum(-1)

    def _linear(self, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        x = x @ w[name + ".weight"].T
        return x + w[name + ".bias"] if name + ".bias" in w else x

    def _head_norm(self, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        return self._norm(w, name, x) if name + ".weight" in w else x

    def _norm(self, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        if self.rms_norm:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * w[name + ".weight"]
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], self.eps)
