"""SLA-GPT's configuration: a GPT with skip-layer attention (SLA), arXiv 2406.11274.

Legend: ``L`` layers numbered ``1..L``; ``G`` key/value groups (``num_key_value_heads``) numbered ``0..G-1``; group
``g`` serves ``H/G`` neighbouring query heads.  In a consumer layer ``l``, a skip group with distance ``n`` attends to
the keys and values that layer ``l - n`` projected, in place of the layer's own; or it takes one of the two alone, or
those of one layer in all later ones (``sla_share``, ``sla_source_layers``).

This file goes into exported folders: it needs transformers, ``rope_fields_sla_gpt.py`` and ``sharing_sla_gpt.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .rope_fields_sla_gpt import RopeFields
from .sharing_sla_gpt import SHARES, Sharing

#: Field -> the values it can have.
CHOICES = {
    "normalization": ("LayerNorm", "RMSNorm"),
    "position_embedding_type": ("learned_absolute", "rope"),
    "sla_kv_projection": ("full", "pruned"),
    "sla_share": tuple(SHARES),
}


class SlaGPTConfig(RopeFields, Sharing, PreTrainedConfig):
    """Shape of an SLA-GPT.

    Args:
        head_dim: size of one head; default ``hidden_size / num_attention_heads``.
        num_key_value_heads: ``G``; default ``num_attention_heads``.
        intermediate_size: default ``4 * hidden_size``.
        hidden_act: a name of transformers' ``ACT2FN``, such as ``gelu``, ``gelu_pytorch_tanh``, ``silu`` or ``relu2``.
        normalization: ``LayerNorm`` or ``RMSNorm``, of the layers and with ``qk_layernorm`` of queries and keys too.
        norm_zero_centered: the norms multiply by ``1 + weight`` (Megatron's ``--apply-layernorm-1p``).
        position_embedding_type: ``learned_absolute`` or ``rope``.
        rope_parameters: ``rope_theta`` (10000), ``partial_rotary_factor`` (1; the share of each head, from its start,
            that rotary embedding turns), ``rope_type`` (``default``) and the fields that transformers knows of that
            type: see ``ROPE_FIELDS``.  Or in its place any of
        rope_theta: of ``rope_parameters``.
        rotary_percent: its ``partial_rotary_factor``.
        rope_scaling: ``None``, or its ``rope_type`` and that type's fields.
        rotary_interleaved: it turns neighbouring pairs (GPT-J) rather than the two halves (Llama, GPT-NeoX).
        attention_bias: bias of the q, k and v projections.
        attention_output_bias: bias of the output projection; default as ``attention_bias``.
        gated_mlp: ``down(act(gate(x)) * up(x))`` instead of ``down(act(up(x)))``.
        sla_share: what skip groups take of an earlier layer: ``kv``, or ``values`` or ``keys`` alone.
        sla_skip_distances: ``n_0 .. n_{D-1}``; the j-th skip group uses ``n_{j mod D}``.  Empty, where
            ``sla_source_layers`` is empty too, means the standard Transformer.
        sla_source_layers: in place of distances; the j-th skip group reads layer ``N_{j mod count}`` in every later
            layer in which it skips.
        sla_skip_groups: the groups that skip, ascending.
        sla_layers: the layers in which they skip, 1-based and ascending; ``None`` means all that have a source.
        sla_kv_projection: ``full`` has K/V weights for every group of every layer, ``pruned`` only for those that some
            layer reads.

    Raises:
        ValueError: for values outside these ranges, in one line that names the field.
    """

    model_type = "sla_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Lets save_pretrained add auto_map and copy these files, so that what it writes loads with trust_remote_code.
    _auto_class = "AutoConfig"
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "gelu"
    max_position_embeddings: int = 1024
    normalization: str = "LayerNorm"
    norm_eps: float = 1e-5
    norm_zero_centered: bool = False
    position_embedding_type: str = "learned_absolute"
    rotary_interleaved: bool = False
    attention_bias: bool = True
    attention_output_bias: bool | None = None
    mlp_bias: bool = True
    gated_mlp: bool = False
    qk_layernorm: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    sla_skip_distances: list[int] | tuple[int, ...] = ()
    sla_skip_groups: list[int] | tuple[int, ...] = ()
    sla_layers: list[int] | tuple[int, ...] | None = None
    sla_kv_projection: str = "full"
    sla_share: str = "kv"
    sla_source_layers: list[int] | tuple[int, ...] = ()

    def __post_init__(self, **kwargs: Any) -> None:
        self._take_rope(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        self.sla_skip_distances = list(self.sla_skip_distances)
        self.sla_source_layers = list(self.sla_source_layers)
        self.sla_skip_groups = list(self.sla_skip_groups)
        if self.sla_layers is None:
            first = min(self.sla_source_layers or self.sla_skip_distances, default=self.num_hidden_layers) + 1
            self.sla_layers = list(range(first, self.num_hidden_layers + 1))
        self.sla_layers = list(self.sla_layers)
        self._check()
        self._fit_plans()
        super().__post_init__(**kwargs)

    def _fit_plans(self) -> None:
        """To the modules that there are, and to what engines can do."""
        absent = [] if self.gated_mlp else ["gate_proj"]
        absent += [] if self.qk_layernorm else ["q_norm", "k_norm"]
        plan = type(self).base_model_tp_plan
        self.base_model_tp_plan = {name: plan[name] for name in plan if name.rpartition(".")[2] not in absent}
        if (self.sla_source_layers or self.sla_skip_distances) and self.sla_skip_groups and self.sla_layers:
            # Engines hand hidden states alone from one stage to the next.
            self.base_model_pp_plan = None

    def validate(self) -> None:
        """Run by ``save_pretrained``, as fields can be set after the configuration was made."""
        self._check()
        super().validate()

    def to_dict(self) -> dict[str, Any]:
        """All fields, those of rotary embedding by both of their names."""
        return self._rope_to_dict(super().to_dict())

    # Checks.

    def _check(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            self._require(_is_int(getattr(self, name)) and getattr(self, name) > 0, name, "a positive integer")
        for name, choices in CHOICES.items():
            self._require(getattr(self, name) in choices, name, " or ".join(choices))
        self._require(self.hidden_act in ACT2FN, "hidden_act", "one of transformers' ACT2FN, such as gelu or silu")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        self._require(heads % groups == 0, "num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        self._require(self.norm_eps > 0, "norm_eps", "a positive number")
        if self.position_embedding_type == "rope":
            self._check_rope()

        distances = self.sla_skip_distances
        self._require(all(_is_int(n) and n > 0 for n in distances), "sla_skip_distances", "integers >= 1")
        sources = self.sla_source_layers
        self._require(
            all(_is_int(n) and 1 <= n <= self.num_hidden_layers for n in sources),
            "sla_source_layers",
            f"layer numbers within 1..{self.num_hidden_layers}",
        )
        self._require(not (sources and distances), "sla_source_layers", "empty beside sla_skip_distances")
        self._require(
            _is_ascending(self.sla_skip_groups, 0, groups - 1),
            "sla_skip_groups",
            f"ascending group indices within 0..{groups - 1}",
        )
        self._require(
            _is_ascending(self.sla_layers, 1, self.num_hidden_layers),
            "sla_layers",
            f"ascending layer numbers within 1..{self.num_hidden_layers}",
        )

    def _require(self, is_good: bool, name: str, wanted: str) -> None:
        if not is_good:
            raise ValueError(f"SlaGPTConfig: {name} must be {wanted}; it is {getattr(self, name)!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ascending(values: Sequence[int], lowest: int, highest: int) -> bool:
    """Whether these are integers within the bounds, each larger than the one before."""
    if not all(_is_int(value) and lowest <= value <= highest for value in values):
        return False
    return all(a < b for a, b in zip(values, values[1:], strict=False))


__all__ = ["SlaGPTConfig"]
