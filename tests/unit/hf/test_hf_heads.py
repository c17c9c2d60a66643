"""Heads for classification and question answering on the Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from sla_megatron.hf import modeling_sla_gpt
from sla_megatron.hf.modeling_sla_gpt import (
    SlaGPTForQuestionAnswering,
    SlaGPTForSequenceClassification,
    SlaGPTForTokenClassification,
    SlaGPTPreTrainedModel,
)

from .hf_models import build, relative_error, tiny, tokens

HEADS = {
    "sequence": (SlaGPTForSequenceClassification, AutoModelForSequenceClassification),
    "token": (SlaGPTForTokenClassification, AutoModelForTokenClassification),
    "question": (SlaGPTForQuestionAnswering, AutoModelForQuestionAnswering),
}
LABELS = {
    "sequence": {"labels": torch.tensor([2, 0])},
    "token": {"labels": tokens() % 3},
    "question": {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 9])},
}


def texts() -> Tensor:
    """Two, the second one padded on the right by three."""
    batch = tokens().clamp(min=1)
    batch[1, -3:] = 0
    return batch


def logits(name: str, model: SlaGPTPreTrainedModel, batch: Tensor) -> Tensor:
    output = model(batch, attention_mask=batch.ne(0))
    if name == "question":
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.logits


@pytest.mark.parametrize("name", HEADS)
def test_a_head_reads_the_model_s_last_hidden_states(name: str) -> None:
    """Forward by the definition of the task, and a backward pass that reaches every weight."""
    torch.manual_seed(3)
    model, batch = HEADS[name][0](tiny(num_labels=3, pad_token_id=0, dtype="float64")).double().eval(), texts()
    hidden = model.model(batch, attention_mask=batch.ne(0)).last_hidden_state
    expected = {
        "sequence": lambda: torch.stack([hidden[0, -1], hidden[1, -4]]) @ model.score.weight.T,
        "token": lambda: model.score(hidden),
        "question": lambda: model.qa_outputs(hidden),
    }[name]()
    assert relative_error(logits(name, model, batch), expected) <= 1e-12
    model(batch, attention_mask=batch.ne(0), **LABELS[name]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_put_on_an_export_and_comes_back_from_a_folder(name: str, tmp_path: Path) -> None:
    ours, auto = HEADS[name]
    causal = build(tiny(pad_token_id=0, num_labels=3), dtype=torch.float32)
    causal.save_pretrained(tmp_path / "export")
    # As exports have it; their base model is found by its own name.
    path = tmp_path / "export/config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["auto_map"] |= {auto.__name__: f"modeling_sla_gpt.{ours.__name__}"}
    path.write_text(json.dumps(config))
    model = auto.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert type(model).__name__ == ours.__name__ and not isinstance(model, ours)
    hidden = [each.model(texts()).last_hidden_state for each in (model, causal)]
    assert hidden[0].equal(hidden[1])

    model.save_pretrained(tmp_path / "tuned")
    again = auto.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    assert logits(name, again.eval(), texts()).equal(logits(name, model.eval(), texts()))


def test_every_head_says_by_which_name_it_is_loaded() -> None:
    named = {getattr(modeling_sla_gpt, name)._auto_class for name in modeling_sla_gpt.__all__} - {None}
    assert named == {"AutoModel", "AutoModelForCausalLM", *(auto.__name__ for _, auto in HEADS.values())}
