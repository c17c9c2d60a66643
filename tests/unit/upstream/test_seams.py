"""How upstream's names are replaced and put back, and that the installed upstream is as expected."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from sla_megatron.upstream.seams import (
    OneOf,
    Reliance,
    Seam,
    SeamError,
    Wrapping,
    replaced,
    require_parameters,
    source_hash,
    wrap_once,
)


class Base:
    """Owns ``method``, which ``Derived`` inherits."""

    def method(self, first: int, second: int = 0) -> str:
        return "upstream"


class Derived(Base):
    """Has ``own`` of its own."""

    own = "upstream"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with a function, two classes and a lazy name, as upstream's modules have."""

    def lazily(name: str) -> str:
        if name == "lazy":
            return "upstream"
        raise AttributeError(name)

    made = ModuleType("stand_ins_target")
    made.__dict__.update(function=lambda first: "upstream", Base=Base, Derived=Derived, __getattr__=lazily)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def seam(path: str, stand_in: Any = "ours", parameters: tuple[str, ...] | None = None) -> Seam:
    """A seam in the module of the fixture."""
    return Seam(f"stand_ins_target:{path}", "a test needs it", parameters, stand_in=stand_in)


# One seam.


@pytest.mark.parametrize(
    "target",
    [
        "no_such_module:x",
        "stand_ins_target:absent",
        "stand_ins_target:Absent.x",
        "stand_ins_target:Base.absent",
    ],
)
def test_a_missing_target_raises(module: ModuleType, target: str) -> None:
    """The error names the target and why it was needed."""
    with pytest.raises(SeamError, match=f"{target} does not exist.*a test needs it"):
        Seam(target, "a test needs it", stand_in=None).resolve()


@pytest.mark.parametrize(
    "expected",
    [
        pytest.param(("self", "first"), id="one-was-added"),
        pytest.param(("self", "first", "second", "third"), id="one-was-removed"),
        pytest.param(("self", "second", "first"), id="reordered"),
        pytest.param(("self", "first", "other"), id="renamed"),
        pytest.param((), id="none-expected"),
    ],
)
def test_a_changed_signature_raises(module: ModuleType, expected: tuple[str, ...]) -> None:
    """The error names the target, what was found and what was expected."""
    with pytest.raises(SeamError) as error:
        seam("Base.method", parameters=expected).resolve()
    assert all(text in str(error.value) for text in ("Base.method", "'first', 'second'", repr(expected)))


def test_the_expected_signature_resolves(module: ModuleType) -> None:
    """The owner is the class that the target names, not the one that it inherits from."""
    assert seam("Derived.method", parameters=("self", "first", "second")).resolve() == (Derived, "method")
    require_parameters(module.function, ("first",), "function")


def test_what_is_relied_on_is_checked_and_left_alone(module: ModuleType) -> None:
    """The same checks, and nothing is replaced."""
    original = module.function
    Reliance("stand_ins_target:function", "a test needs it", ("first",)).require()
    assert module.function is original
    with pytest.raises(SeamError, match="absent does not exist.*a test needs it"):
        Reliance("stand_ins_target:absent", "a test needs it").require()
    with pytest.raises(SeamError, match="has parameters"):
        Reliance("stand_ins_target:function", "a test needs it", ("other",)).require()


# What versions have in different forms.


@pytest.mark.parametrize(
    ("declarations", "fits"),
    [
        pytest.param((seam("absent"), seam("function")), "function", id="under-another-name"),
        pytest.param((seam("function", parameters=("first", "new")), seam("Base.method")), "Base.method", id="changed"),
        pytest.param(
            (replace(seam("function"), sources={"0" * 16: "9.9"}), seam("function", "older")), "function", id="reread"
        ),
        pytest.param((seam("function"), seam("Base.method")), "function", id="the-first-of-two-that-fit"),
    ],
)
def test_the_first_form_that_fits_counts(module: ModuleType, declarations: tuple[Seam, ...], fits: str) -> None:
    """It is what resolves, and what is replaced; the others are left alone."""
    fitting = OneOf(*declarations).fitting()
    assert fitting.target == f"stand_ins_target:{fits}"
    assert OneOf(*declarations).resolve() == fitting.resolve()
    before = module.function, Base.method
    with replaced([OneOf(*declarations)]):
        after = module.function, Base.method
        assert [a is not b for a, b in zip(before, after, strict=True)] == [fits == "function", fits == "Base.method"]
        assert fitting.stand_in in after
    assert (module.function, Base.method) == before


def test_where_no_form_fits_each_says_why(module: ModuleType) -> None:
    """In one error, and nothing is replaced, not what stands beside it either."""
    with pytest.raises(SeamError, match=r"absent does not exist.*; and .*function has parameters \('first',\)"):
        with replaced([seam("Base.method"), OneOf(seam("absent"), seam("function", parameters=("other",)))]):
            pass
    assert Base.method != "ours"


def test_a_form_that_is_only_relied_on_is_not_replaced(module: ModuleType) -> None:
    """A name that is gone, and what has taken its place is overridden instead: that is checked, no more."""
    method = Base.method
    with replaced([OneOf(seam("absent"), Reliance("stand_ins_target:Base.method", "a test needs it"))]):
        assert Base.method is method
    with pytest.raises(SeamError, match="absent does not exist.*; and .*gone does not exist"):
        OneOf(seam("absent"), Reliance("stand_ins_target:gone", "a test needs it")).require()


# Several, installed and put back.


def test_a_function_is_replaced_and_put_back(module: ModuleType) -> None:
    """Ours inside, the very same object as before outside."""
    original = module.function
    with replaced([seam("function")]):
        assert module.function == "ours"
    assert module.function is original


def test_an_inherited_attribute_is_inherited_again(module: ModuleType) -> None:
    """Undoing leaves no copy in the subclass, so that a later change of the base is seen."""
    with replaced([seam("Derived.method"), seam("Derived.own")]):
        assert (Derived.method, Derived.own) == ("ours", "ours")
        assert Base.method != "ours"
    assert "method" not in vars(Derived)
    assert (Derived.method, vars(Derived)["own"]) == (Base.method, "upstream")


def test_a_name_that_a_module_computes_is_put_back(module: ModuleType) -> None:
    """A module may answer for a name that is not in its namespace; after undoing it answers the same."""
    for _ in range(2):
        with replaced([seam("lazy")]):
            assert module.lazy == "ours"
        assert module.lazy == "upstream"


def test_a_configuration_module_is_put_back() -> None:
    """torch's configuration modules hide a deleted name: put back, it is there, and can be replaced again."""
    config = importlib.import_module("torch._inductor.config")
    before = config.debug
    for _ in range(2):
        with replaced([Seam("torch._inductor.config:debug", "a test needs it", stand_in=not before)]):
            assert config.debug is not before
        assert config.debug is before


def test_an_error_inside_puts_everything_back(module: ModuleType) -> None:
    """The block's own error comes through."""
    original = module.function
    with pytest.raises(ZeroDivisionError), replaced([seam("function"), seam("Derived.method")]):
        raise ZeroDivisionError
    assert module.function is original
    assert "method" not in vars(Derived)


@pytest.mark.parametrize(
    "bad", [seam("absent"), seam("Base.method", parameters=("other",))], ids=["missing", "changed"]
)
def test_all_or_nothing(module: ModuleType, bad: Seam) -> None:
    """One seam that does not fit, and none is installed, not even for a moment."""
    original = module.function
    entered = False
    with pytest.raises(SeamError), replaced([seam("function"), bad]):
        entered = True
    assert not entered
    assert module.function is original


def test_all_are_checked_before_the_first_is_installed(module: ModuleType) -> None:
    """While a later target is looked up, upstream's names are still in place."""
    found_in_place = []

    def answer(name: str) -> str:
        found_in_place.append(module.function)
        return "upstream"

    original, module.__getattr__ = module.function, answer
    with replaced([seam("function"), seam("lazy")]):
        assert module.function == "ours"
        looked_up = list(found_in_place)
    assert looked_up[0] is original


def test_a_target_that_cannot_be_set_undoes_the_others(module: ModuleType) -> None:
    """Installation that fails half way leaves nothing installed."""
    original = module.function
    module.Frozen = int
    with pytest.raises(TypeError), replaced([seam("function"), seam("Frozen.real")]):
        pass
    assert module.function is original


def test_nested_replacements_of_one_name_unwind(module: ModuleType) -> None:
    """Inner, then outer, then upstream's."""
    original = module.function
    with replaced([seam("function", "outer")]):
        with replaced([seam("function", "inner")]):
            assert module.function == "inner"
        assert module.function == "outer"
    assert module.function is original


def test_one_name_twice_in_a_list_unwinds(module: ModuleType) -> None:
    """The last one counts, and undoing still ends at upstream's."""
    original = module.function
    with replaced([seam("function", "first"), seam("function", "second")]):
        assert module.function == "second"
    assert module.function is original


# The source.


def restated(versions: dict[str, str]) -> Reliance:
    """A reliance on the source of a method above, as it was read in ``versions``."""
    return Reliance("stand_ins_target:Base.method", "a test needs it", ("self", "first", "second"), sources=versions)


def test_a_source_as_it_was_read(module: ModuleType) -> None:
    """The hash of the text from ``def`` on, as any tool finds it; one of several versions will do."""
    text = '    def method(self, first: int, second: int = 0) -> str:\n        return "upstream"\n'
    found = hashlib.sha256(text.encode()).hexdigest()[:16]
    restated({"0" * 16: "1.0", found: "1.1"}).require()
    assert source_hash(Base.method) == found


def test_a_changed_source_raises(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step more, the same parameters: the error names the target, the versions that were read and the hash found."""
    expected = {source_hash(Base.method): "1.0 and 1.1"}
    restated(expected).require()

    def method(self: Any, first: int, second: int = 0) -> str:
        first += 1
        return "upstream"

    monkeypatch.setattr(Base, "method", method)
    with pytest.raises(SeamError) as error:
        restated(expected).require()
    for text in ("Base.method", "as it was read in Megatron 1.0 and 1.1", source_hash(method), "a test needs it"):
        assert text in str(error.value)


def test_a_wrapper_hides_no_change(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody wrapped, as functools does it, is compared inside."""
    expected = {source_hash(Base.method): "1.0"}

    @functools.wraps(Base.method)
    def method(*args: Any, **kwargs: Any) -> str:
        raise AssertionError

    monkeypatch.setattr(Base, "method", method)
    restated(expected).require()


def test_a_function_without_source_is_not_taken_for_the_expected_one(module: ModuleType) -> None:
    """One that was made by ``exec``, or in C."""
    names: dict[str, Any] = {}
    exec("def function(first): pass", names)
    module.function = names["function"]
    with pytest.raises(SeamError, match="no source to compare"):
        Reliance("stand_ins_target:function", "a test needs it", sources={"0" * 16: "1.0"}).require()


# Wrapped for the rest of the process.


@pytest.fixture
def wrapping(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Wrapping:
    """Wraps ``function``, whose result it puts in brackets; what was wrapped is forgotten afterwards."""
    monkeypatch.setattr("sla_megatron.upstream.seams._wrappers", {})

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> str:
            return f"[{function(*args, **kwargs)}]"

        return wrapper

    return Wrapping("stand_ins_target:function", "a test needs it", ("first",), wrap=wrap)


def test_wrapping_for_good(module: ModuleType, wrapping: Wrapping) -> None:
    """Once or twice it is wrapped once; where one of several does not fit, none is wrapped."""
    absent = Wrapping("stand_ins_target:absent", "a test needs it", wrap=wrapping.wrap)
    with pytest.raises(SeamError, match="absent"):
        wrap_once([wrapping, absent])
    assert module.function(0) == "upstream"
    wrap_once([wrapping])
    wrap_once([wrapping])
    assert module.function(0) == "[upstream]"


@pytest.mark.parametrize("seen_through", [True, False], ids=["functools", "opaque"])
@pytest.mark.parametrize("before", [True, False], ids=["before-ours", "after-ours"])
def test_somebody_else_s_wrapper_stays(
    module: ModuleType, wrapping: Wrapping, seen_through: bool, before: bool
) -> None:
    """Put on before ours or after it, with the original's signature or with none: both run, each once."""

    def theirs() -> None:
        inner = module.function

        def wrapper(*args: Any, **kwargs: Any) -> str:
            return f"<{inner(*args, **kwargs)}>"

        module.function = functools.wraps(inner)(wrapper) if seen_through else wrapper

    if before:
        theirs()
        wrap_once([wrapping])
        wrap_once([wrapping])
        assert module.function(0) == "[<upstream>]"
        return
    wrap_once([wrapping])
    theirs()
    wrap_once([wrapping])
    assert module.function(0) == "<[upstream]>"


def test_an_original_that_was_put_back_is_wrapped_again(module: ModuleType, wrapping: Wrapping) -> None:
    """By itself, or inside a wrapper that can be looked into."""
    original = module.function
    wrap_once([wrapping])
    module.function = original
    wrap_once([wrapping])
    assert module.function(0) == "[upstream]"

    @functools.wraps(original)
    def theirs(first: int) -> str:
        return f"<{original(first)}>"

    module.function = theirs
    wrap_once([wrapping])
    assert module.function(0) == "[<upstream>]"


def test_a_changed_function_is_not_wrapped(module: ModuleType, wrapping: Wrapping) -> None:
    """Its parameters are others; only a wrapper that takes anything says nothing of them."""
    module.function = lambda first, second: "upstream"
    with pytest.raises(SeamError, match="has parameters"):
        wrap_once([wrapping])


def test_a_restated_function_is_not_wrapped_with_another_source(module: ModuleType, wrapping: Wrapping) -> None:
    """A wrapping may say which source it was read in, as any reliance."""
    with pytest.raises(SeamError, match="is not as it was read in Megatron 0.0"):
        wrap_once([replace(wrapping, sources={"0" * 16: "0.0"})])
