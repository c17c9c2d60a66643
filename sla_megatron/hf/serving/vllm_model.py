"""SLA-GPT for vLLM, with the formula's cache: each live (layer, group) pair is kept once.

Where keys or values are shared alone, a layer keeps all groups: vLLM's caches have as many of the one as of the other.

Shapes: t tokens of all sequences of a step, h hidden, d head size, r elements of a head that rotary embedding turns.

Which caches a layer has, and the order of heads, is in ``cache_plan.py``.  A later layer does not share a cache by a
module of its own with vLLM's ``kv_sharing_target_layer_name``: where caches differ in their number of heads, vLLM's
``GPUModelRunner.initialize_attn_backend`` (0.32) looks that module up among those that have a cache: ``KeyError``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from ..attention_sla_gpt import SlaGPTNorm
from ..configuration_sla_gpt import SlaGPTConfig
from ..rotary_sla_gpt import SlaGPTRotaryEmbedding, apply_rotary
from ..sharing_sla_gpt import KINDS
from .cache_plan import LayerPlan, plan_layers, rank_groups
from .weight_places import WeightPlaces

#: What is handed on, ``[t, groups, d]`` each: keys and values, or the one that is shared.
Handed = dict[tuple[int, int], tuple[Tensor, ...]]

#: Cosine and sine, ``[t, 1, r]`` each.
Rotary = tuple[Tensor, Tensor]

#: Scalings whose frequencies change with the length of a sequence: here, sequences of all lengths are one batch.
CHANGING_ROPE = ("dynamic", "longrope")

#: The tensors that have a row for each token.
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


class SlaGPTAttention(nn.Module):
    """Self-attention: one call for each cache that the layer reads.

    Args:
        plan: the layer's, for this rank's groups.
        caches: (layer, later layer) -> the attention module that keeps what both read; this layer's are added.
    """

    def __init__(
        self,
        config: SlaGPTConfig,
        plan: LayerPlan,
        caches: dict[tuple[int, int], Attention],
        cache_config: CacheConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.plan, self.head_dim, self.is_interleaved = plan, config.head_dim, config.rotary_interleaved
        per_group = config.num_attention_heads // config.num_key_value_heads
        ranks = get_tensor_model_parallel_world_size()
        self.num_heads = config.num_attention_heads // ranks
        #: Of keys and of values.
        self.kv_parts = [[len(part) for part in plan.projected(kind)] for kind in KINDS]
        self.call_heads = [len(call) * per_group for call in plan.calls]

        kv_sizes = [ranks * sum(parts) * config.head_dim for parts in self.kv_parts]
        sizes = [config.num_attention_heads * config.head_dim, *filter(None, kv_sizes)]
        self.qkv_proj = MergedColumnParallelLinear(
            config.hidden_size, sizes, bias=config.attention_bias, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            sizes[0], config.hidden_size, bias=config.attention_output_bias, prefix=f"{prefix}.o_proj"
        )
        self.q_norm = SlaGPTNorm(config, config.head_dim) if config.qk_layernorm else None
        self.k_norm = SlaGPTNorm(config, config.head_dim) if config.qk_layernorm and self.kv_parts[0] else None

        def keeper(groups: int, name: str) -> Attention:
            return Attention(
                groups * per_group,
                config.head_dim,
                config.head_dim**-0.5,
                num_kv_heads=groups,
                cache_config=cache_config,
                prefix=f"{prefix}.{name}",
            )

        only_here = len(plan.calls[0]) if plan.is_joined else sum(map(len, plan.only_here.values()))
        self.attn = keeper(only_here, "attn") if only_here else None
        self.shared_attn = nn.ModuleList()
        for readers, groups in {} if plan.is_joined else plan.shared.items():
            # vLLM takes a layer's number from the name, which may have no other part that is a number.
            self.shared_attn.append(keeper(len(groups), f"attn_shared_with_{readers[0]}"))
            caches.update({(plan.layer, reader): self.shared_attn[-1] for reader in readers})
        # No module of its own, which vLLM would give a cache.  A list, as they have no parameters of their own either.
        self.borrowed_attn = [_reader_of(caches[source, plan.layer]) for source in plan.borrowed]

    def forward(self, x: Tensor, handed: Handed, rotary: Rotary | None) -> Tensor:
        """``[t, h]`` to ``[t, h]``.

        Args:
            handed: (layer, later layer) -> what the latter reads of the former.  Those for this layer are taken, this
                layer's added.
            rotary: cosine and sine, ``[t, 1, r]`` each.
        """
        query, keys, values = self._project(x, rotary)
        if self.plan.is_joined:
            output = self.attn(query, *self._joined(keys, values, handed))
        else:
            output = self._attend(query, list(zip(keys, values, strict=True)), handed)
        return self.o_proj(output)[0]

    def _joined(self, keys: list[Tensor], values: list[Tensor], handed: Handed) -> tuple[Tensor, Tensor]:
        """All groups' keys and values, ``[t, groups, d]`` each, in the order of the call."""
        plan, is_of_keys = self.plan, self.plan.shared_kinds == ("key",)
        own = keys if is_of_keys else values
        read = own[: len(own) - len(plan.handed_on)]
        read += [handed.pop((a, plan.layer))[0] for a in plan.only_here if a != plan.layer]
        later = own[len(own) - len(plan.shared) - len(plan.handed_on) :]
        for readers, part in zip([*plan.shared, *plan.handed_on], later, strict=True):
            handed.update({(plan.layer, reader): (part,) for reader in readers})
        joined = read[0] if len(read) == 1 else torch.cat(read, dim=1)
        return (joined, values[0]) if is_of_keys else (keys[0], joined)

    def _attend(self, query: Tensor, own: list[tuple[Tensor, Tensor]], handed: Handed) -> Tensor:
        """A call for each cache, ``[t, heads * d]``."""
        plan = self.plan
        queries = iter(query.split(self.call_heads, dim=1))
        outputs = []
        if self.attn is not None:
            parts = [own.pop(0) if a == plan.layer else handed.pop((a, plan.layer)) for a in plan.only_here]
            key, value = (part[0] if len(part) == 1 else torch.cat(part, dim=1) for part in zip(*parts, strict=True))
            outputs.append(self.attn(next(queries), key, value))
        for readers in [*plan.shared, *plan.handed_on]:
            part = own.pop(0)
            handed.update({(plan.layer, reader): part for reader in readers})
        for readers, attn in zip(plan.shared, self.shared_attn, strict=True):
            outputs.append(attn(next(queries), *handed[plan.layer, readers[0]]))
        for source, attn in zip(plan.borrowed, self.borrowed_attn, strict=True):
            outputs.append(attn(next(queries), *handed.pop((source, plan.layer))))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The queries ``[t, heads, d]`` in the order of the calls, keys and values part by part."""
        heads = self.qkv_proj(x)[0].unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split([self.num_heads, *map(sum, self.kv_parts)], dim=1)
        query = query if self.q_norm is None else self.q_norm(query)
        query = query if rotary is None else apply_rotary(query, *rotary, self.is_interleaved)
        if self.kv_parts[0]:
            key = key if self.k_norm is None else self.k_norm(key)
            key = key if rotary is None else apply_rotary(key, *rotary, self.is_interleaved)
        keys, values = (list(t.split(n, dim=1)) if n else [] for t, n in zip((key, value), self.kv_parts, strict=True))
        return query, keys, values


def _reader_of(attention: Attention) -> Attention:
    """The same module with the same cache, which it reads and does not write.

    Attention finds cache and metadata by the module's name.  A backend that writes within its attention kernel writes
    the same keys and values again.
    """
    reader = copy.copy(attention)
    reader.kv_sharing_target_layer_name = attention.layer_name
    return reader


class SlaGPTMLP(nn.Module):
    """Two layers, or with a gate three."""

    def __init__(self, config: SlaGPTConfig, prefix: str) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.is_gated = config.gated_mlp
        sizes = [inner, inner] if self.is_gated else [inner]
        self.gate_up_proj = MergedColumnParallelLinear(hidden, sizes, bias=bias, prefix=f"{prefix}.gate_up_proj")
        self.down_proj = RowParallelLinear(inner, hidden, bias=bias, prefix=f"{prefix}.down_proj")
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """``[t, h]`` to ``[t, h]``."""
        x = self.gate_up_proj(x)[0]
        if self.is_gated:
            gate, up = x.chunk(2, dim=-1)
            return self.down_proj(self.act_fn(gate) * up)[0]
        return self.down_proj(self.act_fn(x))[0]


class SlaGPTDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: SlaGPTConfig, attention: SlaGPTAttention, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = SlaGPTNorm(config, config.hidden_size)
        self.self_attn = attention
        self.post_attention_layernorm = SlaGPTNorm(config, config.hidden_size)
        self.mlp = SlaGPTMLP(config, f"{prefix}.mlp")

    def forward(self, x: Tensor, handed: Handed, rotary: Rotary | None) -> Tensor:
        """``[t, h]`` to ``[t, h]``; the rest as in :meth:`SlaGPTAttention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), handed, rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class SlaGPTModel(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = _configuration(vllm_config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.has_rope = config.position_embedding_type == "rope"
        if self.has_rope:
            self.rotary_emb = SlaGPTRotaryEmbedding(config)
            if (kind := self.rotary_emb.rope_type) in CHANGING_ROPE:
                raise ValueError(
                    f"rope_type={kind} changes frequencies with the length of a sequence, which vLLM's batches of all "
                    "lengths cannot: use transformers"
                )
        else:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        groups = rank_groups(config, get_tensor_model_parallel_world_size())[get_tensor_model_parallel_rank()]
        caches: dict[tuple[int, int], Attention] = {}
        self.layers = nn.ModuleList()
        for index, plan in enumerate(plan_layers(config, groups)):
            name = f"{prefix}.layers.{index}"
            attention = SlaGPTAttention(config, plan, caches, vllm_config.cache_config, f"{name}.self_attn")
            self.layers.append(SlaGPTDecoderLayer(config, attention, name))
        self.norm = SlaGPTNorm(config, config.hidden_size)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``[t]`` or embeddings ``[t, h]`` at ``positions`` ``[t]`` to hidden states ``[t, h]``."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = None
        if self.has_rope:
            rotary = tuple(part.squeeze(0) for part in self.rotary_emb(x, positions.unsqueeze(0)))
        else:
            x = x + self.embed_positions(positions)
        handed: Handed = {}
        for layer in self.layers:
            x = layer(x, handed, rotary)
        return self.norm(x)


class SlaGPTForCausalLM(nn.Module):
    """The language model, by the interface of vLLM's ``VllmModelForTextGeneration``.

    Raises:
        ValueError: in one line, for a quantised model, rotary frequencies that change with the length, and a
            tensor-parallel size that does not divide the groups of each distance or source layer.  vLLM itself refuses
            pipeline parallelism and adapters of a model that does not declare them, as this one.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = _configuration(vllm_config)
        if vllm_config.quant_config is not None:
            raise ValueError(
                f"quantization={vllm_config.model_config.quantization} is not for SlaGPTForCausalLM, whose weights are "
                "put in another order when they are loaded: leave it out"
            )
        self.model = SlaGPTModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """``[t]`` to ``[t, h]``."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`SlaGPTModel.forward`."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Hidden states ``[t, h]`` to logits ``[t, vocab_size]``, on the first rank."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters from an export's tensors; returns the names of those that were filled.

        Raises:
            ValueError: for a tensor that the model does not have.
        """
        parameters = dict(self.named_parameters())
        places = WeightPlaces(self.config, get_tensor_model_parallel_world_size())
        loaded = set()
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            # Older exports have the rows that Megatron padded beside their weights, by the same names.
            if name in VOCABULARY and len(tensor) != self.config.vocab_size:
                continue
            if (place := places.of(name)) is None:
                continue
            own_name, shard, order, dim = place
            if own_name not in parameters:
                raise ValueError(f"SlaGPTForCausalLM has no tensor {name}, which is among the model's weights")
            tensor = tensor if order is None else tensor.index_select(dim, order.to(tensor.device))
            parameter = parameters[own_name]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, tensor, *([] if shard is None else [shard]))
            loaded.add(own_name)
        return loaded


def _configuration(vllm_config: VllmConfig) -> SlaGPTConfig:
    """Of this package's class: with ``trust_remote_code`` it is of the export's own, as it was then."""
    config = vllm_config.model_config.hf_config
    return config if type(config) is SlaGPTConfig else SlaGPTConfig.from_dict(config.to_dict())
