"""Skip-Layer Attention (arXiv 2406.11274) for GPT pretraining with NVIDIA Megatron.

A Megatron script needs two names from here: ``parse_and_validate_args`` and ``gpt_config_from_args`` stand where it
calls Megatron's functions of the same names, ``hybrid_config_from_args`` where it builds hybrid models.  Without
``--sla`` they do what upstream's do.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

# Loaded on first use: importing Megatron takes seconds, and must not happen before the CPU backend is entered.
_HOME = {
    "FlagError": "common.errors",
    "SLAConfig": "attention.sla_config",
    "add_sla_args": "flags.sla_flags",
    "cpu_backend": "cpu.backend",
    "enter_megatron_device": "cpu.device",
    "gpt_config_from_args": "model.builder",
    "hybrid_config_from_args": "model.builder",
    "megatron_device": "cpu.device",
    "model_config_from_args": "model.builder",
    "parse_and_validate_args": "flags.arguments",
    "report_model": "model.report",
    "sla_config_from_args": "flags.skipping",
    "sla_hybrid_stack_spec": "model.hybrid_stack",
    "sla_layer_spec": "model.layer_specs",
    "sla_transformer_blocks": "model.transformer_block",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
