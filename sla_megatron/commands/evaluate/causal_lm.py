"""A checkpoint's model as transformers and lm-eval ask for one: ``forward`` and ``generate``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .checkpoint_model import CheckpointModel


class MegatronCausalLM(PreTrainedModel, GenerationMixin):
    """What lm-eval's ``HFLM`` needs of a model; its weights are Megatron's, and no parameters of this one."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, checkpoint: CheckpointModel, device: torch.device) -> None:
        config = PretrainedConfig(
            name_or_path=str(checkpoint.folder),
            vocab_size=checkpoint.vocabulary,
            max_position_embeddings=checkpoint.max_position_embeddings,
        )
        super().__init__(config)
        self._checkpoint, self._device = checkpoint, device
        self.post_init()

    @property
    def device(self) -> torch.device:
        """Where tokens are expected."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """That the model computes in; its logits are fp32."""
        return self._checkpoint.dtype

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        """Of the whole model, wherever it lies."""
        return self._checkpoint.num_parameters()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0, **ignored: Any
    ) -> CausalLMOutput:
        """Logits ``[b, s, vocabulary]`` of tokens ``[b, s]``, or of the last ``logits_to_keep`` of them.

        ``attention_mask`` ``[b, s]`` is 0 where a row is padded; on the left, as ``generate`` pads: padding on the
        right needs none.  A row's positions count from its first token.
        """
        if attention_mask is None or bool(attention_mask.all()):
            wanted = None
        else:
            # Behind the tokens, padding is seen by none of them.
            slots = torch.arange(input_ids.shape[1], device=input_ids.device)
            padding = attention_mask.argmax(1, keepdim=True)
            input_ids = input_ids.gather(1, (slots + padding) % input_ids.shape[1])
            wanted = (slots - padding).clamp(min=0)
        if logits_to_keep:
            wanted = self._last(input_ids, wanted)[:, -logits_to_keep:]
        return CausalLMOutput(logits=self._checkpoint.logits(input_ids, wanted))

    @staticmethod
    def _last(input_ids: Tensor, wanted: Tensor | None) -> Tensor:
        if wanted is not None:
            return wanted
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)

    def generate(self, *args: Any, use_cache: bool = False, **kwargs: Any) -> Tensor:
        """transformers' own; there is no cache, whatever is asked: each new token is a forward pass of all before."""
        return super().generate(*args, use_cache=False, **kwargs)
