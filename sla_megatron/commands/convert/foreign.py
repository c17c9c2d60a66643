"""Dense models of other Hugging Face architectures, seen as models of our format: names, shapes and fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .architecture import MODEL_TYPE, Config
from .errors import ConvertError

_DENSE: Config = {"sla_skip_distances": [], "sla_skip_groups": [], "sla_layers": [], "sla_kv_projection": "full"}


class Llama:
    """Llama and its family, whose tensors have the names of our format.

    Raises:
        ConvertError: for a field that changes what is computed and that Megatron's GPT does not have.
    """

    #: Buffers that old exports stored.
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    #: Biases of queries, keys and values that the architecture always has; the others follow ``attention_bias``.
    qkv_bias = False
    qk_norm = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("pretraining_tp", 1) != 1:
            raise ConvertError(f"pretraining_tp {config['pretraining_tp']}: not supported")
        if config.get("use_sliding_window", config.get("sliding_window") is not None):
            raise ConvertError(f"sliding_window {config.get('sliding_window')}: expected none")

    def config(self, theirs: Mapping[str, Any]) -> Config:
        """Their fields as ours."""
        heads, hidden = theirs["num_attention_heads"], theirs["hidden_size"]
        # transformers 5 keeps what was rope_theta and rope_scaling in one dictionary.
        rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ConvertError(f"rope_type {kind}: expected default, linear or llama3")
        scaling = None
        if kind != "default":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            scaling = {"rope_type": kind, **{name: rope[name] for name in names if name in rope}}
        bias = bool(theirs.get("attention_bias", False))
        return _DENSE | {
            "model_type": MODEL_TYPE,
            "vocab_size": theirs["vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": theirs["intermediate_size"],
            "num_hidden_layers": theirs["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": theirs.get("num_key_value_heads") or heads,
            "head_dim": theirs.get("head_dim") or hidden // heads,
            "hidden_act": theirs["hidden_act"],
            "max_position_embeddings": theirs["max_position_embeddings"],
            "normalization": "RMSNorm",
            "norm_eps": theirs["rms_norm_eps"],
            "norm_zero_centered": False,
            "position_embedding_type": "rope",
            "rope_theta": float(theirs.get("rope_theta") or rope.get("rope_theta", 10000.0)),
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "rope_scaling": scaling,
            "attention_bias": bias or self.qkv_bias,
            "attention_output_bias": bias,
            "mlp_bias": bool(theirs.get("mlp_bias", False)),
            "gated_mlp": True,
            "qk_layernorm": self.qk_norm,
            "tie_word_embeddings": bool(theirs.get("tie_word_embeddings", False)),
        }

    def name(self, ours: str) -> str:
        """Their name of our tensor."""
        return ours

    def stored_shape(self, ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of our tensor."""
        return shape

    def tensor(self, ours: str, stored: Tensor) -> Tensor:
        """Our tensor from theirs."""
        return stored


class Qwen2(Llama):
    """Biases of queries, keys and values."""

    qkv_bias = True


class Qwen3(Llama):
    """Norms of queries and keys."""

    qk_norm = True


class GPT2:
    """GPT-2: linear weights are stored ``[in, out]``, queries, keys and values in one.

    Raises:
        ConvertError: for a field that changes what is computed and that Megatron's GPT does not have.
    """

    #: Causal masks that old exports stored.
    ignored: tuple[str, ...] = (".attn.bias", ".attn.masked_bias", "lm_head.weight")

    _NAMES: Mapping[str, str] = {
        "model.embed_tokens": "wte",
        "model.embed_positions": "wpe",
        "model.norm": "ln_f",
        "input_layernorm": "ln_1",
        "self_attn.q_proj": "attn.c_attn",
        "self_attn.k_proj": "attn.c_attn",
        "self_attn.v_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        plain = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
        for name, value in plain.items():
            if config.get(name, value) != value:
                raise ConvertError(f"{name} {config[name]}: expected {value}")
        self._hidden = config["n_embd"]

    def config(self, theirs: Mapping[str, Any]) -> Config:
        """Their fields as ours."""
        hidden, heads = theirs["n_embd"], theirs["n_head"]
        act = theirs["activation_function"]
        return _DENSE | {
            "model_type": MODEL_TYPE,
            "vocab_size": theirs["vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": theirs.get("n_inner") or 4 * hidden,
            "num_hidden_layers": theirs["n_layer"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
            "hidden_act": "gelu_pytorch_tanh" if act == "gelu_new" else act,
            "max_position_embeddings": theirs["n_positions"],
            "normalization": "LayerNorm",
            "norm_eps": theirs["layer_norm_epsilon"],
            "norm_zero_centered": False,
            "position_embedding_type": "learned_absolute",
            "rope_theta": 10000.0,
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "rope_scaling": None,
            "attention_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "gated_mlp": False,
            "qk_layernorm": False,
            "tie_word_embeddings": bool(theirs.get("tie_word_embeddings", True)),
        }

    def name(self, ours: str) -> str:
        """Their name of our tensor."""
        if ours == "lm_head.weight":
            return ours
        module, kind = ours.rsplit(".", 1)
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            return f"h.{layer}.{self._NAMES[rest]}.{kind}"
        return f"{self._NAMES[module]}.{kind}"

    def stored_shape(self, ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of our tensor."""
        if not self._is_linear(ours):
            return shape
        rows = 3 * shape[0] if self._third(ours) is not None else shape[0]
        return (*shape[1:], rows)

    def tensor(self, ours: str, stored: Tensor) -> Tensor:
        """Our tensor from theirs."""
        if not self._is_linear(ours):
            return stored
        third = self._third(ours)
        if third is not None:
            stored = stored.narrow(-1, third * self._hidden, self._hidden)
        return stored.t() if stored.dim() == 2 else stored

    @staticmethod
    def _is_linear(ours: str) -> bool:
        return "_proj." in ours

    @staticmethod
    def _third(ours: str) -> int | None:
        """Which third of the mixed projection it is."""
        for index, kind in enumerate(("q_proj", "k_proj", "v_proj")):
            if kind in ours:
                return index
        return None


Foreign = Llama | GPT2

#: ``model_type`` -> how its models are read.
FOREIGN: Mapping[str, Callable[[Mapping[str, Any]], Foreign]] = {
    "llama": Llama,
    "mistral": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "gpt2": GPT2,
}
