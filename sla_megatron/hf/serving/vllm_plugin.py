"""What vLLM calls in each of its processes, by the entry point ``vllm.general_plugins``."""

from __future__ import annotations

from transformers import AutoConfig
from vllm import ModelRegistry

from ..configuration_sla_gpt import SlaGPTConfig


def register() -> None:
    """Make vLLM know the configuration and the model, so that exports need no ``trust_remote_code``.

    The model is named, not imported: vLLM looks at it in a process of its own, as importing may start a GPU.
    """
    AutoConfig.register(SlaGPTConfig.model_type, SlaGPTConfig, exist_ok=True)
    ModelRegistry.register_model("SlaGPTForCausalLM", f"{__package__}.vllm_model:SlaGPTForCausalLM")
