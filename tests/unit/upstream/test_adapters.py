"""What versions of Megatron do in different ways: the adapters do in each what the installed one does."""

from __future__ import annotations

import inspect
import re
from argparse import Namespace
from typing import Any

import pytest

pytestmark = [pytest.mark.usefixtures("megatron_imported"), pytest.mark.filterwarnings("ignore")]


def test_the_groups_are_those_that_the_schedules_take_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read off upstream's sources: every group that they set, from the function that they ask."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    from sla_megatron.upstream.adapters.process_groups import schedule_groups

    asked = [name for name in vars(parallel_state) if re.fullmatch(r"get_\w+_groups?", name)]
    for name in asked:
        # Which function, and with which arguments, but for one that only says what to do without groups.
        def answer(*args: Any, name: str = name, check_initialized: bool = True, **kwargs: Any) -> Any:
            return name, args, frozenset((key, value) for key, value in kwargs.items() if value)

        monkeypatch.setattr(parallel_state, name, answer)
    source = getattr(schedules, "_build_default_pg_collection", None)
    source = source or inspect.unwrap(schedules.forward_backward_pipelining_with_interleaving)
    pattern = r"^( *)(\w+ = parallel_state\.|pg_collection\.\w+ = |pg_collection = )(?:.*\(\n(?:.*\n)*?\1\)|.*)"
    lines = [match[0] for match in re.finditer(pattern, inspect.getsource(source), re.MULTILINE)]
    names = vars(schedules) | {"parallel_state": parallel_state}
    exec("\n".join(inspect.cleandoc(line) for line in lines), names)
    expected = {name: group for name, group in vars(names["pg_collection"]).items() if group is not None}
    assert {"tp", "cp", "pp", "embd", "pos_embd", "dp_cp", "tp_dp_cp"} <= expected.keys()
    found = vars(schedule_groups())
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("is_told", [True, False], ids=["0.19 and 0.20", "dev"])
def test_a_configuration_is_of_our_class(is_told: bool) -> None:
    """Whether upstream is told the class or not; what it set in the transformer's configuration stays."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

    from sla_megatron.model.builder import SLAGPTModelConfig
    from sla_megatron.upstream.adapters.model_configs import config_of_class

    transformer = MLATransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)

    def told(args: Namespace, extra: int = 0, model_config_cls: type = GPTModelConfig) -> GPTModelConfig:
        made = model_config_cls(transformer=transformer, vocab_size=args.vocab_size + extra)
        # A field of both: it is set inside, and read from the class outside.
        made.rotary_base = 500
        return made

    def not_told(args: Namespace, extra: int = 0) -> GPTModelConfig:
        return told(args, extra)

    made = config_of_class(told if is_told else not_told, SLAGPTModelConfig, Namespace(vocab_size=30), extra=2)
    assert type(made) is SLAGPTModelConfig
    assert (made.vocab_size, made.sla, made.core_attention) == (32, None, "megatron")
    assert made.get_builder_cls().__name__ == "SLAGPTModelBuilder"
    assert made.transformer is transformer and transformer.rotary_base == 500


def test_nodes_are_there_where_they_can_be_imported() -> None:
    """Those that carry K/V between them; in dev they are elsewhere, and cut otherwise."""
    from sla_megatron.upstream.adapters.schedule_nodes import has_schedule_nodes

    try:
        from megatron.core.models.common.utils import TransformerLayerNode  # noqa: F401
    except ImportError:
        assert not has_schedule_nodes()
    else:
        assert has_schedule_nodes()
