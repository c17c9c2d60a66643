"""The finished runs as a table: text, Markdown, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ...common.tables import table
from .summary import Group, Spread

HEADER = (
    "size",
    "context",
    "distance",
    "heads",
    "variant",
    "seeds",
    "validation loss",
    "less dense",
    "perplexity",
    "training loss",
    "tokens/s",
    "parameters",
)
_LEFT = (0, 4)

NOTE = (
    "Mean over seeds, ± the sample's standard deviation, (least-most); losses in nats a token. less dense: the\n"
    "difference to the dense run of the same seed; below 0, skip-layer attention is better. heads: query heads that\n"
    "skip, of all."
)
_NOTE_ON_VARIANTS = "distance: in layers, or the layer that all read. parameters: in brackets, how far from dense."


def cells(group: Group) -> tuple[str, ...]:
    """One row of the table; the validation loss as ``3.1234 ± 0.0012 (3.1222-3.1246)``, of one seed as ``3.1234``."""
    loss = group.validation_loss
    return (
        group.size,
        str(group.context),
        "dense" if group.is_dense else group.distance,
        "" if group.is_dense else f"{group.skip_heads}/{group.num_heads}",
        group.variant,
        str(len(group.seeds)),
        _mean(loss, ".4f") + ("" if loss.n == 1 else f" ({loss.least:.4f}-{loss.most:.4f})"),
        "" if group.difference is None else _mean(group.difference, "+.4f"),
        f"{group.perplexity.mean:.3f}",
        f"{group.training_loss.mean:.4f}",
        f"{group.tokens_per_second:,.0f}",
        _parameters(group),
    )


def _parameters(group: Group) -> str:
    """``1,234,567``, and where the dense run has others, ``1,234,567 (-0.02 %)``."""
    dense = group.dense_parameters
    if dense is None or dense == group.parameters:
        return f"{group.parameters:,}"
    return f"{group.parameters:,} ({100 * (group.parameters / dense - 1):+.2f} %)"


def note(groups: Sequence[Group]) -> str:
    """What the columns of the table mean."""
    has_variants = any(g.setting.sources or g.dense_parameters not in (None, g.parameters) for g in groups)
    return f"{NOTE}\n{_NOTE_ON_VARIANTS}" if has_variants else NOTE


def _mean(spread: Spread, style: str) -> str:
    return f"{spread.mean:{style}}" + ("" if spread.deviation is None else f" ± {spread.deviation:.4f}")


def as_text(groups: Sequence[Group]) -> str:
    """For a terminal."""
    return f"{table(HEADER, [cells(group) for group in groups], _LEFT)}\n\n{note(groups)}"


def as_markdown(groups: Sequence[Group]) -> str:
    """For a page."""
    rule = [":--" if column in _LEFT else "--:" for column in range(len(HEADER))]
    rows = ["| " + " | ".join(row) + " |" for row in (HEADER, rule, *(cells(group) for group in groups))]
    return "\n".join([*rows, "", note(groups)])


def as_json(groups: Sequence[Group], rows: Sequence[dict]) -> str:
    """For a program: the groups, and every row."""
    return json.dumps({"groups": [group.as_json() for group in groups], "runs": list(rows)}, indent=1)
