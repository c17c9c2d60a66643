"""Small models of other architectures, as transformers saves them, and folders as people leave them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .tokenizers import hugging_face_folder

LAYERS, VOCABULARY = 4, 100

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 24,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "initializer_range": 0.3,
}


def save_foreign(folder: Path, kind: str = "Llama", **changes: Any) -> None:
    """A model of ``{kind}ForCausalLM`` (GPT-2's is ``GPT2LMHeadModel``) in which no parameter is 0 or 1 throughout."""
    import transformers

    torch.manual_seed(4)
    shape = _GPT2 if kind == "GPT2" else _SHAPE
    config = getattr(transformers, f"{kind}Config")(**shape | changes)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too: at 1 and 0 they would hide mistakes.
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def edit_config(folder: Path, *without: str, **changes: Any) -> None:
    """Change entries of ``config.json``, and leave some out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in without}))


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def put_tensors(folder: Path, found: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    # The format takes no two names of one tensor.
    found = {name: tensor.clone().contiguous() for name, tensor in found.items()}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def save_ours(folder: Path, *left_out: str, **changes: Any) -> None:
    from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
    from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

    torch.manual_seed(4)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    more = {"max_position_embeddings": 24, "initializer_range": 0.3, "sla_skip_distances": [2]}
    skipping = {"sla_skip_groups": [1, 2, 3], "hidden_act": "gelu_pytorch_tanh"}
    SlaGPTForCausalLM(SlaGPTConfig(**shape | more | skipping | changes)).save_pretrained(folder)
    edit_config(folder, *left_out)


TIED = {"tie_word_embeddings": True}

# What is done to a folder.

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
Edit = Callable[[Path], None]


def configured(*without: str, **changes: Any) -> Edit:
    return lambda folder: edit_config(folder, *without, **changes)


def with_head(change: float = 0.0, only: bool = False, kind: torch.dtype | None = None) -> Edit:
    """A copy of the embeddings as ``lm_head.weight``, ``change`` off."""

    def edit(folder: Path) -> None:
        found = tensors(folder)
        (name,) = (n for n in found if n.endswith(("embed_tokens.weight", "wte.weight")))
        found["lm_head.weight"] = (found[name] + change).to(kind or found[name].dtype)
        if only:
            del found[name]
        put_tensors(folder, found)

    return edit


def renamed(old: str, new: str) -> Edit:
    return lambda folder: put_tensors(folder, {re.sub(old, new, n): t for n, t in tensors(folder).items()})


def without(name: str) -> Edit:
    return lambda folder: put_tensors(folder, {n: t for n, t in tensors(folder).items() if n != name})


def added(name: str, tensor: Any = None) -> Edit:
    return lambda folder: put_tensors(folder, {**tensors(folder), name: torch.ones(3) if tensor is None else tensor})


def stored_as(kind: torch.dtype, of: str = "") -> Edit:
    return lambda folder: put_tensors(folder, {n: t.to(kind) if of in n else t for n, t in tensors(folder).items()})


def torch_files(parts: int = 1, old: bool = False, more: dict[str, Any] | None = None) -> Edit:
    """``pytorch_model.bin``, or several and their index."""

    def edit(folder: Path) -> None:
        found = list(tensors(folder).items())
        (folder / "model.safetensors").unlink()
        names = [f"pytorch_model-{i:05d}-of-{parts:05d}.bin" for i in range(1, parts + 1)]
        names = names if parts > 1 else ["pytorch_model.bin"]
        for i, name in enumerate(names):
            # Old files cannot be mapped into memory.
            torch.save({**dict(found[i::parts]), **(more or {})}, folder / name, _use_new_zipfile_serialization=not old)
        if parts > 1:
            index = {"metadata": {}, "weight_map": {n: names[i] for i in range(parts) for n, _ in found[i::parts]}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    return edit


def sharded(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits] and None


def with_tokenizer(folder: Path, rows: int, **special: str) -> int:
    """A Qwen2 of ``rows`` tokens more than its tokenizer has; returns how many that has."""
    from transformers import AutoTokenizer

    hugging_face_folder(folder / "hf", **special)
    tokens = len(AutoTokenizer.from_pretrained(folder / "hf"))
    save_foreign(folder / "hf", "Qwen2", vocab_size=tokens + rows)
    return tokens
