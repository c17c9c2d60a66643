"""Small models of other architectures, as transformers saves them, and folders as people leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    import torch
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
