"""Tiny exports, what transformers makes of them, and vLLM's engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

VOCABULARY, LONGEST, NEW_TOKENS = 97, 160, 12


def write_export(folder: Path, **changes: Any) -> None:
    """Six layers of eight heads of 32, the smallest that vLLM's attention on a CPU takes; every parameter is random."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "head_dim": 32,
        "max_position_embeddings": LONGEST,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    model = SlaGPTForCausalLM(SlaGPTConfig(**(shape | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    # As sla-convert writes it; save_pretrained names the class alone that was saved.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"]["AutoModel"] = "modeling_sla_gpt.SlaGPTModel"
    path.write_text(json.dumps(config))


def load(folder: Path) -> PreTrainedModel:
    """By transformers, with the code that the folder holds."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def generated(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The new tokens, greedily chosen."""
    output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    """Of each token but the first, after those before it, ``[len(prompt) - 1]``."""
    ids = torch.tensor(prompt)
    return model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """One in fp32, not compiled; whatever vLLM keeps of it in this process is gone at the end."""
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": LONGEST,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
        # Counts what prefix caching finds.
        "disable_log_stats": False,
    }
    llm = LLM(str(folder), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def asked(llm: LLM, texts: list[list[int]], **options: Any) -> list:
    """vLLM's answers, greedily chosen, to all at once."""
    parameters = SamplingParams(**({"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True} | options))
    return llm.generate([{"prompt_token_ids": text} for text in texts], parameters, use_tqdm=False)


def answers(llm: LLM, texts: list[list[int]]) -> list[list[int]]:
    """The new tokens."""
    return [list(answer.outputs[0].token_ids) for answer in asked(llm, texts)]


def cache_bytes_per_token(llm: LLM) -> float:
    """By what vLLM allocates on each rank."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    config = scheduler.kv_cache_config
    return config.kv_cache_tensors[0].size / config.num_blocks / scheduler.block_size
