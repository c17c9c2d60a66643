"""Every argument that Megatron has is mapped, known not to matter, or refused."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter

import pytest

from sla_megatron.commands.convert import stored_arguments
from sla_megatron.commands.convert.errors import ConvertError
from sla_megatron.commands.convert.harmless_arguments import HARMLESS
from sla_megatron.commands.convert.model_arguments import FINE, MAPPED, ONLY_WITH, REFUSED
from sla_megatron.commands.convert.stored_arguments import completed, megatron_defaults, names, require_understood
from sla_megatron.commands.convert.trained_model import HERE

ROWS = (MAPPED, *HARMLESS.values(), *ONLY_WITH.values(), " ".join(REFUSED))


def test_every_argument_is_in_one_row() -> None:
    """An argument that upstream adds is in none, until somebody has looked at what it does."""
    listed = Counter(name for row in ROWS for name in names(row))
    assert [name for name, count in listed.items() if count > 1] == []
    assert sorted(set(megatron_defaults()) - set(listed)) == []


def test_owners_are_refused_or_mapped() -> None:
    """An argument that is read only beside another is fine because that other one is looked at."""
    assert set(ONLY_WITH) <= {*REFUSED, *names(MAPPED)}
    assert set(FINE) <= set(REFUSED)


def test_an_argument_that_upstream_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """At upstream's default it is fine, whatever that is; else it is refused by name."""
    monkeypatch.setattr(stored_arguments, "megatron_defaults", lambda: megatron_defaults() | {"new_gate": "plain"})
    require_understood(completed(Namespace()))
    with pytest.raises(ConvertError, match="--new-gate fancy: no argument that this version knows"):
        require_understood(completed(Namespace(new_gate="fancy")))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_refused(name: str) -> None:
    """Off, at the default and missing it is fine."""
    for fine in (None, False, *([megatron_defaults()[name]] if name in megatron_defaults() else [])):
        require_understood(completed(Namespace(**{name: fine})))
    with pytest.raises(ConvertError, match=f"^--{name.replace('_', '-')} set: .* has no field for it"):
        require_understood(completed(Namespace(**{name: "set"})))


def test_all_are_named_at_once() -> None:
    with pytest.raises(ConvertError, match="^--qk-l2-norm True, --use-mup True: .* has no field for them$"):
        require_understood(completed(Namespace(use_mup=True, qk_l2_norm=True)))
    with pytest.raises(ConvertError, match=r"^--a 1, --b \[1\]: .* --override a=None"):
        require_understood(completed(Namespace(b=[1], a=1)))


def test_the_comparison_changes_nothing_that_the_model_is_made_of() -> None:
    """But for two arguments that choose a kernel, and with it, for one activation, a function: those are asked for."""
    model = {*names(MAPPED), *REFUSED, *(name for row in ONLY_WITH.values() for name in names(row))}
    assert set(HERE) & model == {"use_te_activation_func", "use_transformer_engine_op_fuser"}
