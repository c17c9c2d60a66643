"""Dense models of other Hugging Face architectures and of our format: one description, for the way in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .architecture import DENSE, MODEL_TYPE, Config
from .errors import ConvertError

# Other names in transformers' ACT2FN of the same functions.
_ACTIVATIONS = {
    "swish": "silu",
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_pytorch_tanh"),
}

# What Megatron computes of Llama 3's rotary scaling beside its factor, which --rope-scaling-factor says.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Foreign:
    """One architecture, between its fields and tensors and those of our format."""

    #: Its ``model_type``, and transformers' class.
    kind: str
    architecture: str
    #: Ends of the names of buffers that old exports stored.
    ignored: tuple[str, ...]
    #: Our fields, and theirs of the same value; two of ours may be one of theirs.
    fields: Mapping[str, str]
    #: Our fields that all its models have alike.
    fixed: Config
    #: Their fields that change what is computed, at the only value that Megatron has.
    plain: Config = {}
    #: Their fields for what of ours is always so, whose defaults would say something else.
    written: Config = {}

    def config(self, theirs: Mapping[str, Any]) -> Config:
        """Their fields as ours.

        Args:
            theirs: their configuration as transformers completes it.

        Raises:
            ConvertError: for a field that changes what is computed and that Megatron's GPT does not have.
        """
        for name, value in self.plain.items():
            if theirs.get(name, value) != value:
                raise ConvertError(f"{name} {theirs[name]}: expected {value}")
        filled = self._filled(theirs)
        found = {"model_type": MODEL_TYPE} | {ours: filled[name] for ours, name in self.fields.items()}
        found["hidden_act"] = _ACTIVATIONS.get(found["hidden_act"], found["hidden_act"])
        return DENSE | found | self.fixed | self.derived(found) | self._positions(theirs)

    def misfit(self, ours: Mapping[str, Any]) -> str | None:
        """Why a dense model of our fields is none of this architecture; None where transformers' class computes it."""
        said: Config = {}
        for name, value in (self.fixed | self.derived(ours)).items():
            if ours[name] != value:
                return f"{name} {ours[name]}, {self.kind} has {value}"
        for name, theirs in self.fields.items():
            if said.setdefault(theirs, ours[name]) != ours[name]:
                return f"{name} {ours[name]}, {self.kind} has one {theirs} for all"
        return None

    def is_usual(self, ours: Mapping[str, Any]) -> bool:
        """Of a model that fits: whether it has nothing that engines with this architecture are known to pass over."""
        return all(ours[name] == value for name, value in self.usual(ours).items())

    def theirs(self, ours: Mapping[str, Any]) -> Config:
        """Our fields, of a model that fits, as theirs: the content of ``config.json`` but for types and tokens."""
        found = {name: ours[field] for field, name in self.fields.items()}
        return {"architectures": [self.architecture], "model_type": self.kind} | found | self.plain | self.written

    def derived(self, ours: Mapping[str, Any]) -> Config:
        """Our fields that others say, in all its models."""
        return {}

    def usual(self, ours: Mapping[str, Any]) -> Config:
        """Our fields that engines with this architecture take for granted, though transformers' class reads them."""
        return {}

    def _filled(self, theirs: Mapping[str, Any]) -> Config:
        """Their fields, with what they leave to be computed."""
        raise NotImplementedError

    def _positions(self, theirs: Mapping[str, Any]) -> Config:
        """Our fields of rotary positions."""
        raise NotImplementedError

    def names(self, ours: str) -> tuple[str, ...]:
        """Their names of our tensor: in a model with its head, and in one that was saved without."""
        raise NotImplementedError

    def stored_shape(self, ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of our tensor."""
        return shape

    def tensor(self, ours: str, stored: Tensor) -> Tensor:
        """Our tensor from theirs."""
        return stored

    def is_transposed(self, ours: str) -> bool:
        """Whether our tensor is the other way round in theirs."""
        return False


class Family(Foreign):
    """What Llama's family has in common; its tensors have the names of our format."""

    ignored = ("rotary_emb.inv_freq",)
    fields = {
        **{name: name for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        **{name: name for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")},
        **{name: name for name in ("max_position_embeddings", "tie_word_embeddings")},
        "norm_eps": "rms_norm_eps",
    }
    fixed = {
        **{"normalization": "RMSNorm", "norm_zero_centered": False, "gated_mlp": True, "qk_layernorm": False},
        **{"position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_interleaved": False},
    }

    def theirs(self, ours: Mapping[str, Any]) -> Config:
        """Rotary positions are said as transformers 5 reads them, and as what came before and engines do."""
        theta, scaling = ours["rope_theta"], ours.get("rope_scaling")
        rope: Config = {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        if scaling is not None:
            rope |= {"rope_scaling": dict(scaling), "rope_parameters": {**scaling, "rope_theta": theta}}
        return super().theirs(ours) | rope

    def _filled(self, theirs: Mapping[str, Any]) -> Config:
        _refuse_window(theirs)
        heads = theirs["num_attention_heads"]
        return {
            **theirs,
            "num_key_value_heads": theirs.get("num_key_value_heads") or heads,
            "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // heads,
        }

    def _positions(self, theirs: Mapping[str, Any]) -> Config:
        rope = theirs["rope_parameters"]
        if "rope_theta" not in rope:
            raise ConvertError(f"rope_parameters {', '.join(rope)}: expected the same for all layers")
        return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": _rope_scaling(rope)}

    def names(self, ours: str) -> tuple[str, ...]:
        """Those of our format."""
        return (ours, ours.removeprefix("model."))


# One field of theirs for the projections of attention, in and out.
_ATTENTION_BIAS = {"attention_bias": "attention_bias", "attention_output_bias": "attention_bias"}


class Llama(Family):
    """Biases in all linear layers of attention, of the MLP, of both or of none."""

    kind, architecture = "llama", "LlamaForCausalLM"
    fields = Family.fields | _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"}
    plain = {"pretraining_tp": 1}

    def misfit(self, ours: Mapping[str, Any]) -> str | None:
        """Likewise; transformers' configuration wants whole heads, whatever ``head_dim`` says."""
        if ours["hidden_size"] % ours["num_attention_heads"]:
            return f"hidden_size {ours['hidden_size']}, llama has a multiple of its {ours['num_attention_heads']} heads"
        return super().misfit(ours)

    def usual(self, ours: Mapping[str, Any]) -> Config:
        """SGLang's Llama has no biases in its MLP."""
        return {"mlp_bias": False}


class Mistral(Family):
    """No biases, whatever a configuration says.  Without a window, Llama's function."""

    kind, architecture = "mistral", "MistralForCausalLM"
    fixed = Family.fixed | {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False}
    written = {"sliding_window": None}


class Qwen2(Family):
    """Biases of queries, keys and values."""

    kind, architecture = "qwen2", "Qwen2ForCausalLM"
    fixed = Family.fixed | {"attention_bias": True, "attention_output_bias": False, "mlp_bias": False}
    written = {"use_sliding_window": False, "sliding_window": None}

    def usual(self, ours: Mapping[str, Any]) -> Config:
        """Its configuration has no such field: vLLM computes it, transformers reads it if it is there."""
        return {"head_dim": ours["hidden_size"] // ours["num_attention_heads"]}

    def theirs(self, ours: Mapping[str, Any]) -> Config:
        """That field only where it says something."""
        found = super().theirs(ours)
        return {name: value for name, value in found.items() if name != "head_dim" or not self.is_usual(ours)}


class Qwen3(Family):
    """Norms of queries and keys."""

    kind, architecture = "qwen3", "Qwen3ForCausalLM"
    fields = Family.fields | _ATTENTION_BIAS
    fixed = Family.fixed | {"qk_layernorm": True, "mlp_bias": False}
    written = Qwen2.written


class GPT2(Foreign):
    """GPT-2: linear weights are stored ``[in, out]``, queries, keys and values in one."""

    kind, architecture = "gpt2", "GPT2LMHeadModel"
    #: Causal masks.
    ignored = (".attn.bias", ".attn.masked_bias")
    fields = {
        **{"vocab_size": "vocab_size", "hidden_size": "n_embd", "intermediate_size": "n_inner"},
        **{"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"},
        **{"hidden_act": "activation_function", "norm_eps": "layer_norm_epsilon"},
        "tie_word_embeddings": "tie_word_embeddings",
    }
    fixed = {
        **{"normalization": "LayerNorm", "norm_zero_centered": False, "gated_mlp": False, "qk_layernorm": False},
        **{"position_embedding_type": "learned_absolute", "attention_bias": True, "attention_output_bias": True},
        "mlp_bias": True,
    }
    # reorder_and_upcast_attn is another order of the same sums.
    plain = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}

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

    def derived(self, ours: Mapping[str, Any]) -> Config:
        """A key for each query, and heads that share the width."""
        heads = ours["num_attention_heads"]
        return {"num_key_value_heads": heads, "head_dim": ours["hidden_size"] // heads}

    def usual(self, ours: Mapping[str, Any]) -> Config:
        """SGLang and llama.cpp have one activation; the former a tied head, the latter one width of the MLP."""
        wide = 4 * ours["hidden_size"]
        return {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "intermediate_size": wide}

    def theirs(self, ours: Mapping[str, Any]) -> Config:
        """In the words of the published configuration, ``n_ctx`` among them, which llama.cpp reads."""
        found = super().theirs(ours)
        if found["n_inner"] == 4 * found["n_embd"]:
            found["n_inner"] = None
        if found["activation_function"] == "gelu_pytorch_tanh":
            found["activation_function"] = "gelu_new"
        return found | {"n_ctx": found["n_positions"]}

    def _filled(self, theirs: Mapping[str, Any]) -> Config:
        return {**theirs, "n_inner": theirs["n_inner"] or 4 * theirs["n_embd"]}

    def _positions(self, theirs: Mapping[str, Any]) -> Config:
        return {"rope_theta": 10000.0, "rotary_percent": 1.0, "rotary_interleaved": False, "rope_scaling": None}

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
        rows = shape[0] if self._third(ours) is None else 3 * shape[0]
        return (*shape[1:], rows) if self.is_transposed(ours) else (rows, *shape[1:])

    def tensor(self, ours: str, stored: Tensor) -> Tensor:
        """Our tensor from theirs."""
        third = self._third(ours)
        if third is not None:
            stored = stored.chunk(3, dim=-1)[third]
        return stored.t() if self.is_transposed(ours) else stored

    def is_transposed(self, ours: str) -> bool:
        """Linear weights are."""
        return ours.endswith("_proj.weight")

    @staticmethod
    def _third(ours: str) -> int | None:
        """Which third of the mixed projection it is."""
        for index, kind in enumerate(("q_proj", "k_proj", "v_proj")):
            if kind in ours:
                return index
        return None


#: ``model_type`` -> the architecture; of two that fit a model, the first is meant.
FOREIGN: Mapping[str, Foreign] = {each.kind: each for each in (Llama(), Mistral(), Qwen2(), Qwen3(), GPT2())}


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
