"""A dense model, seen as a skip-layer model of the same weights: a start for continued pretraining."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ...flags.asked import hybrid_pattern
from ...flags.skipping import SLA_SETTINGS, resolve_settings, sla_config_from_args
from .architecture import sla_fields
from .errors import ConvertError
from .mapping import sla_of
from .prune import WithLiveRows
from .source import Source


class WithSLA(WithLiveRows):
    """A dense source with skip-layer attention.

    Args:
        dense: the source.
        settings: the ``--sla`` flags beside ``--sla`` as attributes of parsed arguments (``SLA_SETTINGS``), with the
            meaning and the refusals that they have in pretraining; what is left out takes its default.

    Raises:
        ConvertError: if ``dense`` is not dense.
        FlagError: for settings that are not this model's.
    """

    def __init__(self, dense: Source, **settings: Any) -> None:
        if unknown := sorted(set(settings) - set(SLA_SETTINGS)):
            raise TypeError(f"{unknown[0]}: expected some of {', '.join(SLA_SETTINGS)}")
        if not sla_of(dense.config).is_dense:
            raise ConvertError(f"{dense.path}: it is a skip-layer model already")
        chosen = _arguments(dense, settings)
        resolve_settings(chosen)
        super().__init__(dense, {**dense.config, **sla_fields(sla_config_from_args(chosen))})


def _arguments(dense: Source, settings: Mapping[str, Any]) -> Namespace:
    """What pretraining's own checks look at, of the model of ``dense``."""
    config = dense.config
    return Namespace(
        **{name: settings.get(name) for name in SLA_SETTINGS},
        sla=True,
        num_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        group_query_attention=True,
        num_query_groups=config["num_key_value_heads"],
        hybrid_layer_pattern=hybrid_pattern(dense.args or Namespace()),
    )
