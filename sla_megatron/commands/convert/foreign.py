"""Dense models of other Hugging Face architectures, seen as models of our format: names, shapes and fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...common.errors import last_line
from .architecture import MODEL_TYPE, Config
from .errors import ConvertError

_DENSE: Config = {"sla_skip_distances": [], "sla_skip_groups": [], "sla_layers": [], "sla_kv_projection": "full"}

# Other names in transformers' ACT2FN of the same functions.
_ACTIVATIONS = {
    "swish": "silu",
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_pytorch_tanh"),
}

# What Megatron computes of Llama 3's rotary scaling beside its factor, which --rope-scaling-factor says.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Llama:
    """Llama and its family, whose tensors have the names of our format.

    Args:
        theirs: their configuration as transformers completes it.

    Raises:
        ConvertError: for a field that changes what is computed and that Megatron's GPT does not have.
    """

    #: Buffers that old exports stored.
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    #: Biases of queries, keys and values that the architecture always has; of all others what ``fields`` says.
    qkv_bias = False
    #: Which of ``attention_bias`` and ``mlp_bias`` the architecture reads.
    fields: tuple[str, ...] = ("attention_bias", "mlp_bias")
    qk_norm = False

    def __init__(self, theirs: Mapping[str, Any]) -> None:
        if theirs.get("pretraining_tp", 1) != 1:
            raise ConvertError(f"pretraining_tp {theirs['pretraining_tp']}: not supported")
        _refuse_window(theirs)

    def config(self, theirs: Mapping[str, Any]) -> Config:
        """Their fields as ours."""
        heads, hidden = theirs["num_attention_heads"], theirs["hidden_size"]
        rope = theirs["rope_parameters"]
        if "rope_theta" not in rope:
            raise ConvertError(f"rope_parameters {', '.join(rope)}: expected the same for all layers")
        attention_bias, mlp_bias = (
            name in self.fields and bool(theirs.get(name)) for name in ("attention_bias", "mlp_bias")
        )
        return _DENSE | {
            "model_type": MODEL_TYPE,
            "vocab_size": theirs["vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": theirs["intermediate_size"],
            "num_hidden_layers": theirs["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": theirs.get("num_key_value_heads") or heads,
            "head_dim": theirs.get("head_dim") or hidden // heads,
            "hidden_act": _ACTIVATIONS.get(theirs["hidden_act"], theirs["hidden_act"]),
            "max_position_embeddings": theirs["max_position_embeddings"],
            "normalization": "RMSNorm",
            "norm_eps": theirs["rms_norm_eps"],
            "norm_zero_centered": False,
            "position_embedding_type": "rope",
            "rope_theta": float(rope["rope_theta"]),
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "rope_scaling": _rope_scaling(rope),
            "attention_bias": attention_bias or self.qkv_bias,
            "attention_output_bias": attention_bias,
            "mlp_bias": mlp_bias,
            "gated_mlp": True,
            "qk_layernorm": self.qk_norm,
            "tie_word_embeddings": bool(theirs["tie_word_embeddings"]),
        }

    def names(self, ours: str) -> tuple[str, ...]:
        """Their names of our tensor: in a model with its head, and in one that was saved without."""
        return (ours, ours.removeprefix("model."))

    def stored_shape(self, ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of our tensor."""
        return shape

    def tensor(self, ours: str, stored: Tensor) -> Tensor:
        """Our tensor from theirs."""
        return stored


class Mistral(Llama):
    """No biases, whatever a configuration says."""

    fields = ()


class Qwen2(Llama):
    """Biases of queries, keys and values."""

    qkv_bias = True
    fields = ()


class Qwen3(Llama):
    """Norms of queries and keys."""

    qk_norm = True
    fields = ("attention_bias",)


class GPT2:
    """GPT-2: linear weights are stored ``[in, out]``, queries, keys and values in one.

    Args:
        theirs: their configuration as transformers completes it.

    Raises:
        ConvertError: for a field that changes what is computed and that Megatron's GPT does not have.
    """

    #: Causal masks that old exports stored.
    ignored: tuple[str, ...] = (".attn.bias", ".attn.masked_bias")

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

    def __init__(self, theirs: Mapping[str, Any]) -> None:
        # reorder_and_upcast_attn is another order of the same sums.
        plain = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
        for name, value in plain.items():
            if theirs[name] != value:
                raise ConvertError(f"{name} {theirs[name]}: expected {value}")
        self._hidden = theirs["n_embd"]

    def config(self, theirs: Mapping[str, Any]) -> Config:
        """Their fields as ours."""
        hidden, heads = theirs["n_embd"], theirs["n_head"]
        act = theirs["activation_function"]
        return _DENSE | {
            "model_type": MODEL_TYPE,
            "vocab_size": theirs["vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": theirs["n_inner"] or 4 * hidden,
            "num_hidden_layers": theirs["n_layer"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
            "hidden_act": _ACTIVATIONS.get(act, act),
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
            "tie_word_embeddings": bool(theirs["tie_word_embeddings"]),
        }

    def names(self, ours: str) -> tuple[str, ...]:
        """Their names of our tensor: in a model with its head, and in one that was saved without."""
        if ours == "lm_head.weight":
            return (ours,)
        module, kind = ours.rsplit(".", 1)
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            name = f"h.{layer}.{self._NAMES[rest]}.{kind}"
        else:
            name = f"{self._NAMES[module]}.{kind}"
        return (f"transformer.{name}", name)

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
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "gpt2": GPT2,
}


def foreign_config(folder: Path) -> Config:
    """The fields of ``config.json`` and transformers' defaults for all others, whichever version wrote the file.

    Raises:
        ConvertError: for what transformers refuses, or for weights that are quantised.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except Exception as error:  # Of many kinds, and strict ones of no common class.
        raise ConvertError(f"{folder / 'config.json'} cannot be read: {last_line(error).strip()}") from error
    finally:
        logging.set_verbosity(level)
    refuse_quantised(theirs, folder)
    return theirs


def refuse_quantised(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ``ConvertError`` for weights that are not numbers of floating point."""
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "of some kind")
        raise ConvertError(f"{folder}: quantization_config ({method}): expected weights that are not quantised")


def _rope_scaling(rope: Mapping[str, Any]) -> Config | None:
    """Ours of their ``rope_parameters``."""
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise ConvertError(f"rope_type {kind}: expected default, linear or llama3")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ConvertError(f"partial_rotary_factor {rope['partial_rotary_factor']}: expected none, or 1")
    if kind == "default":
        return None
    constants = _LLAMA3_CONSTANTS if kind == "llama3" else {}
    for name, value in constants.items():
        if rope.get(name) != value:
            raise ConvertError(f"{name} {rope.get(name)} of rope_type llama3: expected {value:g}, as Megatron has it")
    return {"rope_type": kind, "factor": rope["factor"], **constants}


def _refuse_window(theirs: Mapping[str, Any]) -> None:
    """Raise ``ConvertError`` for attention to a window that is shorter than the context."""
    kinds, window, context = theirs.get("layer_types"), theirs.get("sliding_window"), theirs["max_position_embeddings"]
    other = sorted(set(kinds or ()) - {"full_attention"})
    if other and (other != ["sliding_attention"] or window is None):
        raise ConvertError(f"layer_types {', '.join(other)}: expected full_attention")
    if window is not None and window < context and (kinds is None or other):
        raise ConvertError(f"sliding_window {window}: expected none, or at least max_position_embeddings, {context}")
