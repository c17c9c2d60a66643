"""Which tensor of the Hugging Face format is which part of which Megatron tensor: a table.  Pure Python.

Megatron names are those of a torch_dist checkpoint, the same for every layer spec: a norm lies with the linear layer
that it feeds, whether a kernel fuses the two or not.  ``{i}`` counts layers from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...attention.sla_config import KINDS, SLAConfig

#: A part of a Megatron tensor: all of it, one kind of row of the mixed projection, half of a gated MLP's first matrix,
#: the rows of the vocabulary that are not padding.
WHOLE, QUERY, KEY, VALUE, GATE, UP, VOCABULARY = "whole", "query", "key", "value", "gate", "up", "vocabulary"


@dataclass(frozen=True)
class Row:
    """One line of the table: ``hf`` is part ``part`` of ``megatron``; both may hold ``{i}``."""

    hf: str
    megatron: str
    part: str = WHOLE


@dataclass(frozen=True)
class Entry:
    """One tensor of one model.

    Attributes:
        hf: its name in the Hugging Face format.
        megatron: its tensor in the checkpoint, without the layer.
        layer: counted from 0; ``None`` outside of the layers.
        part: the part of that tensor which it is.
        shape: its own shape.
    """

    hf: str
    megatron: str
    layer: int | None
    part: str
    shape: tuple[int, ...]


def table(config: Mapping[str, Any]) -> list[Row]:
    """The rows for a model of ``config`` (the fields of ``config.json``)."""
    is_layer_norm = config["normalization"] == "LayerNorm"
    rows = [Row("model.embed_tokens.weight", "embedding.word_embeddings.weight", VOCABULARY)]
    if config["position_embedding_type"] == "learned_absolute":
        rows.append(Row("model.embed_positions.weight", "embedding.position_embeddings.weight"))
    layer, decoder = "model.layers.{i}", "decoder.layers"
    attention, theirs = f"{layer}.self_attn", f"{decoder}.self_attention"
    rows += _norm(f"{layer}.input_layernorm", f"{theirs}.linear_qkv.layer_norm_", is_layer_norm)
    for name, part in (("q_proj", QUERY), ("k_proj", KEY), ("v_proj", VALUE)):
        rows += _linear(f"{attention}.{name}", f"{theirs}.linear_qkv", part, config["attention_bias"])
    if config["qk_layernorm"]:
        rows += _norm(f"{attention}.q_norm", f"{theirs}.q_layernorm.", is_layer_norm)
        rows += _norm(f"{attention}.k_norm", f"{theirs}.k_layernorm.", is_layer_norm)
    rows += _linear(f"{attention}.o_proj", f"{theirs}.linear_proj", WHOLE, config["attention_output_bias"])
    rows += _norm(f"{layer}.post_attention_layernorm", f"{decoder}.mlp.linear_fc1.layer_norm_", is_layer_norm)
    for name, part in (("gate_proj", GATE), ("up_proj", UP)) if config["gated_mlp"] else (("up_proj", WHOLE),):
        rows += _linear(f"{layer}.mlp.{name}", f"{decoder}.mlp.linear_fc1", part, config["mlp_bias"])
    rows += _linear(f"{layer}.mlp.down_proj", f"{decoder}.mlp.linear_fc2", WHOLE, config["mlp_bias"])
    rows += _norm("model.norm", "decoder.final_layernorm.", is_layer_norm)
    if not config["tie_word_embeddings"]:
        rows.append(Row("lm_head.weight", "output_layer.weight", VOCABULARY))
    return rows


def _linear(hf: str, megatron: str, part: str, bias: bool) -> list[Row]:
    return [Row(f"{hf}.{kind}", f"{megatron}.{kind}", part) for kind in ("weight", "bias")[: 1 + bool(bias)]]


def _norm(hf: str, megatron: str, bias: bool) -> list[Row]:
    return [Row(f"{hf}.{kind}", f"{megatron}{kind}") for kind in ("weight", "bias")[: 1 + bias]]


def sla_of(config: Mapping[str, Any]) -> SLAConfig:
    """Skip-layer attention of a model; dense ones have no skip group."""
    sources = tuple(config.get("sla_source_layers", ()))
    return SLAConfig(
        num_layers=config["num_hidden_layers"],
        num_query_groups=config["num_key_value_heads"],
        skip_distances=() if sources else tuple(config["sla_skip_distances"]) or (1,),
        num_skip_groups=len(config["sla_skip_groups"]),
        layers=tuple(config["sla_layers"]),
        kv_projection=config["sla_kv_projection"],
        # Exports of before have neither.
        share=config.get("sla_share", "kv"),
        source_layers=sources,
    )


def entries(config: Mapping[str, Any]) -> Iterator[Entry]:
    """Every tensor of a model of ``config``, layer by layer, with its shape."""
    sla, rows = sla_of(config), table(config)
    per_layer = [row for row in rows if "{i}" in row.hf]
    first = rows.index(per_layer[0])
    yield from (_entry(config, sla, row, None) for row in rows[:first])
    for layer in range(config["num_hidden_layers"]):
        for row in per_layer:
            # Without a live one there is no key to project or to norm, or no value to project, in pruned mode.
            kind = KEY if ".k_norm." in row.hf else row.part
            if kind not in KINDS or sla.projected_groups(layer + 1, kind):
                yield _entry(config, sla, row, layer)
    yield from (_entry(config, sla, row, None) for row in rows[first + len(per_layer) :])


def _entry(config: Mapping[str, Any], sla: SLAConfig, row: Row, layer: int | None) -> Entry:
    name = row.hf.format(i=layer)
    return Entry(name, row.megatron, layer, row.part, _shape(config, sla, row, layer))


def _shape(config: Mapping[str, Any], sla: SLAConfig, row: Row, layer: int | None) -> tuple[int, ...]:
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head
    module, kind = row.hf.rsplit(".", 2)[-2:]
    if module in ("embed_tokens", "lm_head"):
        return (config["vocab_size"], hidden)
    if module == "embed_positions":
        return (config["max_position_embeddings"], hidden)
    if module in ("q_norm", "k_norm"):
        return (head,)
    if "norm" in module:
        return (hidden,)
    projected = {kind: 0 if layer is None else len(sla.projected_groups(layer + 1, kind)) for kind in KINDS}
    sizes = {
        "q_proj": (queries, hidden),
        "k_proj": (projected[KEY] * head, hidden),
        "v_proj": (projected[VALUE] * head, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }[module]
    return sizes if kind == "weight" else sizes[:1]


def qkv_rows(config: Mapping[str, Any], layer: int) -> dict[str, list[tuple[int, int]]]:
    """Where the rows of query, key and value lie in the mixed projection of ``layer`` (from 0): (start, length).

    Megatron's rows go group by group: the group's queries, its key, its value; a pruned model has no row of a
    key, or of a value, that nobody reads.  In order of the group, each kind's rows are the Hugging Face tensor's.
    """
    sla, head = sla_of(config), config["head_dim"]
    projected = {kind: set(sla.projected_groups(layer + 1, kind)) for kind in KINDS}
    queries = head * config["num_attention_heads"] // config["num_key_value_heads"]
    found: dict[str, list[tuple[int, int]]] = {QUERY: [], KEY: [], VALUE: []}
    start = 0
    for group in range(config["num_key_value_heads"]):
        for part, length in ((QUERY, queries), (KEY, head), (VALUE, head)):
            if part == QUERY or group in projected[part]:
                found[part].append((start, length))
                start += length
    return found
