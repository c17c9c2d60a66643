"""SLA-GPT for transformers: a GPT whose skip heads attend to an earlier layer's keys and values.

Shapes: b batch, s new tokens, S all tokens (past and new), h hidden, d head size, N groups of which a layer keeps keys,
or values (live ones, in the configuration's stored order; keys and values have each their own N).

Keys and values that later layers read leave a layer as outputs and enter the reader as inputs: they need no cache, they
are exact under gradient checkpointing, and they are moved along with the hidden states between devices.  With a cache,
layer l's entry holds its N groups; a new token is decoded on slices of the stored tensors, or on copies of short ones.

transformers' ``KVSharingDict`` stands for layers that take all of another's, and is an object beside the inputs and
outputs, where neither reentrant checkpointing nor FSDP2 sees it, with all that was put in until the pass ends.

This file goes into exported folders: it needs torch, transformers and the other ``*_sla_gpt.py`` files.
"""

# No postponed annotations: transformers' tools read forward's, to see which outputs can be asked for.

import sys
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_sla_gpt import SlaGPTAttention, SlaGPTNorm
from .configuration_sla_gpt import SlaGPTConfig
from .rotary_sla_gpt import SlaGPTRotaryEmbedding
from .sharing_sla_gpt import KINDS


class SlaGPTMLP(nn.Module):
    """Two layers, or with a gate three."""

    def __init__(self, config: SlaGPTConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, h]`` to ``[b, s, h]``."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SlaGPTDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: SlaGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = SlaGPTNorm(config, config.hidden_size)
        self.self_attn = SlaGPTAttention(config, layer_idx)
        self.post_attention_layernorm = SlaGPTNorm(config, config.hidden_size)
        self.mlp = SlaGPTMLP(config)

        number = layer_idx + 1
        readers = [
            sorted({m for g in config.stored_in_block(number, kind) for m in config.readers(number, g, kind)})
            for kind in KINDS
        ]
        #: Index of the kind -> the later layers that read what this one keeps of it; none without any.
        self.readers = {kind: found for kind, found in enumerate(readers) if found}

    def forward(
        self, hidden_states: Tensor, *sources: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> Tensor | tuple[Tensor, ...]:
        """One layer.

        Args:
            hidden_states: ``[b, s, h]``.
            sources: the keys and values of earlier layers that this one reads, ``[b, N, S, d]`` each, layer by layer,
                keys first.  Positional, so that gradient checkpointing sees them and accelerate moves them to this
                layer's device.
            kwargs: as for ``SlaGPTAttention``.

        Returns:
            the output ``[b, s, h]``, and each of its own keys and values, ``[b, N, S, d]``, that later layers read.
        """
        attended, _, own = self.self_attn(self.input_layernorm(hidden_states), sources, **kwargs)
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states, *(own[kind] for kind in self.readers)) if self.readers else hidden_states


# The models.


class SlaGPTPreTrainedModel(PreTrainedModel):
    config: SlaGPTConfig
    config_class = SlaGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SlaGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SlaGPTDecoderLayer, "attentions": SlaGPTAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SlaGPTNorm):
            module.reset_parameters()


class SlaGPTModel(SlaGPTPreTrainedModel):
    """Embeddings, layers and the last norm."""

    _auto_class = "AutoModel"

    def __init__(self, config: SlaGPTConfig) -> None:
        super().__init__(config)
        # No padding_idx: models are often trained with a padding token that also ends documents.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.has_rope = config.position_embedding_type == "rope"
        if self.has_rope:
            self.rotary_emb = SlaGPTRotaryEmbedding(config)
        else:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([SlaGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = SlaGPTNorm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Tokens ``[b, s]`` or embeddings ``[b, s, h]`` to hidden states ``[b, s, h]``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # The name that generation gives it since transformers 5.24.
        if isinstance(kwargs.get("cache"), Cache):
            past_key_values = kwargs.pop("cache")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if is_counted := position_ids is None:
            position_ids = self._position_ids(x, attention_mask, past_key_values)
        # A graph has no place for it; what generation runs is looked at before.
        if not torch.compiler.is_compiling():
            self.require_learned(position_ids, _length(position_ids, past_key_values), is_counted)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(x, position_ids) if self.has_rope else None
        # Of pipeline stages, the first adds them: the others have something in the place of the first layer.
        if not self.has_rope and not isinstance(self.layers[0], nn.Identity):
            x = x + self.embed_positions(position_ids)

        # Reader -> the keys and values that earlier layers projected for it; dropped once it has read them.
        carried: dict[int, list[Tensor]] = defaultdict(list)
        for number, layer in enumerate(self.layers, start=1):
            output = layer(
                x,
                *carried.pop(number, ()),
                attention_mask=mask,
                rotary=rotary,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
            x, *own = output if isinstance(output, tuple) else (output,)
            if own:
                for tensor, readers in zip(own, layer.readers.values(), strict=True):
                    for reader in readers:
                        carried[reader].append(tensor)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _position_ids(self, x: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
        """``[b or 1, s]``; with a mask of padding, counted from each sequence's first token."""
        new = x.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is not None and attention_mask.shape == (x.shape[0], past + new):
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:].to(x.device)
        return (torch.arange(new, device=x.device) + past).unsqueeze(0)

    def require_learned(self, position_ids: Tensor, length: int, is_counted: bool = False) -> None:
        """Raise ``ValueError`` for a position beyond the last learned one, of which there is no embedding.

        Args:
            position_ids: of any shape.
            length: no position is further on; known without asking the device.
            is_counted: that is certain, as they were counted here.
        """
        most = self.config.max_position_embeddings
        if self.has_rope or not position_ids.numel() or position_ids.device.type == "meta":
            return
        # Looking at positions would wait for the device in every step.
        if length <= most and (is_counted or position_ids.device.type != "cpu"):
            return
        highest = int(position_ids.max())
        if highest >= most:
            raise ValueError(f"{highest + 1} tokens, but positions are learned for max_position_embeddings={most}")


def _length(position_ids: Tensor, past_key_values: Cache | None) -> int:
    """Tokens past and new, or as many as there can be: a static cache's length is a tensor on the device."""
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    if isinstance(past, int):
        return past + position_ids.shape[-1]
    return max(getattr(layer, "max_cache_len", sys.maxsize) for layer in past_key_values.layers)


class SlaGPTForCausalLM(SlaGPTPreTrainedModel, GenerationMixin):
    """The language model: ``SlaGPTModel`` and the projection to the vocabulary."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: SlaGPTConfig) -> None:
        super().__init__(config)
        self.model = SlaGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if config.base_model_pp_plan is None:
            self._pp_plan = {}

    # transformers looks for inputs_embeds among the parameters before it takes any.
    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own.  Raises ``ValueError`` beyond the last learned position, which a compiled step cannot."""
        has_mask = attention_mask is not None and attention_mask.dim() == 2
        length = attention_mask.shape[1] if has_mask else input_ids.shape[1]
        kwargs |= {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if (positions := inputs.get("position_ids")) is not None:
            self.model.require_learned(positions, length)
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Next-token logits ``[b, s, vocab_size]``, and with labels the mean cross entropy.

        Args:
            labels: ``[b, s]``, the tokens themselves (they are shifted here); -100 is left out of the loss.
            logits_to_keep: only that many last positions get logits (0: all), or the positions it lists.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Other heads, each transformers' own on the base model.


class SlaGPTHead:
    """What transformers' heads need to find the base model."""

    def __init__(self, config: SlaGPTConfig) -> None:
        # They ask AutoModel, which knows classes; loading from a folder may have made this one anew.
        AutoModel.register(type(config), SlaGPTModel, exist_ok=True)
        super().__init__(config)


class SlaGPTForSequenceClassification(SlaGPTHead, GenericForSequenceClassification, SlaGPTPreTrainedModel):
    _auto_class = "AutoModelForSequenceClassification"


class SlaGPTForTokenClassification(SlaGPTHead, GenericForTokenClassification, SlaGPTPreTrainedModel):
    _auto_class = "AutoModelForTokenClassification"


class SlaGPTForQuestionAnswering(SlaGPTHead, GenericForQuestionAnswering, SlaGPTPreTrainedModel):
    _auto_class = "AutoModelForQuestionAnswering"


__all__ = [
    "SlaGPTForCausalLM",
    "SlaGPTForQuestionAnswering",
    "SlaGPTForSequenceClassification",
    "SlaGPTForTokenClassification",
    "SlaGPTModel",
    "SlaGPTPreTrainedModel",
]
