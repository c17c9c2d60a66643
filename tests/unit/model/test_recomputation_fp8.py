"""Full recomputation in fp8 and fp4: the contexts and checkpoints that upstream opens for a dense model, in its order.

Transformer Engine is not needed: what stands in for its contexts and its checkpoint takes note of them, under the names
by which upstream looks them up.  A model's numbers are then fp32's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sla_megatron.attention.sla_config import SLAConfig

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.filterwarnings("ignore")]

LAYERS, SEQUENCE, VOCABULARY = 6, 8, 32
SKIPPING = SLAConfig(LAYERS, 4, (2, 3), 3)
#: Of a hybrid model: layers of three kinds, of which Mamba's is no ``TransformerLayer``; three are attention.
PATTERN = "*-M*-*"
Event = tuple[Any, ...]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What is opened, checkpointed and run, as it happens."""
    from megatron.core import recompute, tensor_parallel
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.transformer import transformer_block

    seen: list[Event] = []

    def note(kind: str) -> Callable[..., Any]:
        @contextmanager
        def context(config: Any, layer_no: int = -1, is_init: bool = False) -> Iterator[None]:
            if not is_init:
                seen.append(("open", kind, config.first_last_layers_bf16, layer_no))
            yield
            if not is_init:
                seen.append(("close", kind, layer_no))

        return context

    for module in (recompute, transformer_block, hybrid_block):
        for kind in ("fp8", "fp4"):
            monkeypatch.setattr(module, f"get_{kind}_context", note(kind))

    def te_checkpoint(function: Any, distributes: bool, tracker: Any, group: Any, *arguments: Any) -> Any:
        def run(*again: Any) -> Any:
            seen.append(("run", torch.is_grad_enabled()))
            return function(*again)

        seen.append(("checkpoint", distributes, tracker, group))
        return tensor_parallel.checkpoint(run, distributes, *arguments)

    for module in (recompute, transformer_block):
        # In Megatron's branch dev a GPT's block looks it up itself.
        if hasattr(module, "te_checkpoint"):
            monkeypatch.setattr(module, "te_checkpoint", te_checkpoint)
    return seen


def config(**settings: Any) -> Any:
    """Upstream's, which looks at the settings' values; no dropout."""
    from megatron.core.transformer import TransformerConfig

    from sla_megatron.cpu.flags import CONFIG_ON_CPU

    sizes = {"num_layers": LAYERS, "hidden_size": 16, "num_attention_heads": 4}
    return TransformerConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0, **CONFIG_ON_CPU, **settings)


@pytest.fixture(scope="module")
def models(one_rank: None) -> dict[str, Any]:
    """A dense GPT and one with skip-layer attention."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from sla_megatron import sla_transformer_blocks

    built = {}
    for name, sla in (("dense", None), ("sla", SKIPPING)):
        torch.manual_seed(3)
        with sla_transformer_blocks(sla):
            built[name] = GPTModel(config(), get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE).train()
    return built


@pytest.fixture(scope="module")
def hybrids(one_rank: None) -> dict[str, Any]:
    """A dense hybrid model and one with skip-layer attention, of the same layers."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from sla_megatron import sla_hybrid_stack_spec
    from tests.support.hybrid_layers import with_mean

    dense, built = with_mean(config()), {}
    for name, stack in (("dense", dense), ("sla", sla_hybrid_stack_spec(dense, SLAConfig(3, 4, (1, 2), 3), PATTERN))):
        torch.manual_seed(3)
        built[name] = HybridModel(config(), stack, VOCABULARY, SEQUENCE, hybrid_layer_pattern=PATTERN).train()
    return built


def gradients(model: Any, events: list[Event], frozen: int = 0, **settings: Any) -> dict[str, torch.Tensor]:
    """A step, in which the first ``frozen`` layers and the embedding may not be trained; its layers are noted too."""
    vars(model.config).update(vars(config(**settings)))
    model.requires_grad_(True).zero_grad()
    for module in (model.embedding, *model.decoder.layers)[: frozen and frozen + 1]:
        module.requires_grad_(False)

    def note(layer: Any, _: Any) -> None:
        events.append(("layer", layer.layer_number))

    hooks = [layer.register_forward_pre_hook(note) for layer in model.decoder.layers]
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(SEQUENCE).expand_as(tokens)
    events.clear()
    model(tokens, positions, None, labels=tokens.roll(1)).mean().backward()
    for hook in hooks:
        hook.remove()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


RECIPES = {
    recipe: {"fp8": "hybrid", "fp8_recipe": recipe} for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")
}
RECIPES["nvfp4"] = {"fp4": "e2m1", "fp4_recipe": "nvfp4"}
ENDS_IN_BF16 = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2}
METHODS = {
    "uniform-1": {"recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform-2": {"recompute_method": "uniform", "recompute_num_layers": 2},
    "block-3": {"recompute_method": "block", "recompute_num_layers": 3},
    # The first two layers' input has no gradient: three later ones are recomputed.
    "block-3-frozen": {"recompute_method": "block", "recompute_num_layers": 3, "frozen": 1},
}
#: How often layers are run in contexts of their own: all of them, and those that are recomputed, again.
RUNS = {"uniform-1": 12, "uniform-2": 12, "block-3": 9, "block-3-frozen": 9}


#: Upstream refuses delayed scaling with layers in bf16.
CASES = [(recipe, ends) for recipe in RECIPES for ends in (False, True) if not (ends and recipe == "delayed")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("recipe", "ends"), CASES)
def test_contexts_are_upstreams(
    models: dict[str, Any], events: list[Event], recipe: str, ends: bool, method: str
) -> None:
    """Forward and recomputation; and the gradients are those without recomputation."""
    assert_contexts_are_upstreams(models, events, recipe, ends, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("recipe", "ends"), [("delayed", False), ("mxfp8", True), ("mxfp8", False), ("nvfp4", False)])
def test_so_they_are_with_layers_of_several_kinds(
    hybrids: dict[str, Any], events: list[Event], recipe: str, ends: bool, method: str
) -> None:
    """Each layer's context is that of its number in the stack, whatever its kind."""
    assert_contexts_are_upstreams(hybrids, events, recipe, ends, method)


def assert_contexts_are_upstreams(
    models: dict[str, Any], events: list[Event], recipe: str, ends: bool, method: str
) -> None:
    settings = RECIPES[recipe] | (ENDS_IN_BF16 if ends else {})
    full = {"recompute_granularity": "full", **METHODS[method]}
    gradients(models["dense"], events, **settings, **full)
    upstreams = list(events)
    found = gradients(models["sla"], events, **settings, **full)
    assert events == upstreams
    opened = [event[-1] for event in upstreams if event[0] == "open"]
    # Delayed scaling has one context, around all layers; Transformer Engine's checkpoint keeps it for a recomputation.
    assert opened == [-1] if recipe == "delayed" else len(opened) == RUNS[method] and set(opened) == set(range(LAYERS))
    checkpoints = sum(event[0] == "checkpoint" for event in upstreams)
    assert checkpoints == sum(event == ("run", True) for event in upstreams) > 0
    if recipe != "mxfp8" or ends:
        return
    expected = gradients(models["sla"], events, **settings, frozen=METHODS[method].get("frozen", 0))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("name", "broken"), [("_quantization", "number"), ("_checkpoint", "plain")])
def test_other_contexts_are_seen(
    models: dict[str, Any], events: list[Event], monkeypatch: pytest.MonkeyPatch, name: str, broken: str
) -> None:
    """Controls: a layer's number is one too high; a checkpoint is not Transformer Engine's."""
    from megatron.core import recompute, tensor_parallel

    from sla_megatron.model import recomputation

    copies = {
        "number": lambda layer: recompute.get_fp8_context(layer.config, layer.layer_number),
        "plain": lambda block, function, *tensors: tensor_parallel.checkpoint(function, False, *tensors),
    }
    settings = {**RECIPES["mxfp8"], "recompute_granularity": "full", **METHODS["uniform-2"]}
    gradients(models["dense"], events, **settings)
    upstreams = list(events)
    monkeypatch.setattr(recomputation, name, copies[broken])
    gradients(models["sla"], events, **settings)
    assert events and events != upstreams
