"""``docs/support.md``: its table is what the checks of the flags say, and names tests that there are.

Nothing here is taken from the table's own text: refusals are raised by the checks, tests are read from their files, and
a table that is wrong in any of these ways is found.
"""

from __future__ import annotations

import ast
import sys
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from traceback import walk_tb

import pytest

from sla_megatron.common.errors import FlagError, StartError, flag_of
from sla_megatron.flags import support_page
from sla_megatron.flags.families import REFUSED, UNTESTED, Family
from sla_megatron.flags.support import FAMILIES, WORKS
from tests.support.launch import ROOT

pytestmark = [pytest.mark.usefixtures("megatron", "sources_parsed_once"), pytest.mark.filterwarnings("ignore")]

#: Of a table of refusals: what its row says.  Of a ``raise``: its file and first line.
Row = tuple[str, str | int]


@pytest.fixture(scope="module")
def said(megatron_imported: None, sources_parsed_once: None) -> dict[str, StartError | None]:
    """What the checks say of every command line of the table."""
    from sla_megatron import cpu_backend

    with cpu_backend():
        return _said(FAMILIES)


def _said(families: Iterable[Family]) -> dict[str, StartError | None]:
    return {flags: support_page.refusal(flags) for one in families for flags in (*one.accepted, *one.refused)}


# The page.


def test_the_committed_page_is_what_the_command_writes() -> None:
    support_page.main(["--check"])


def test_a_page_that_differs_is_found(tmp_path: Path) -> None:
    page = tmp_path / "support.md"
    page.write_text(support_page.PAGE.read_text().replace("no --qk-clip with --sla", "no --qk-clip", 1))
    with pytest.raises(SystemExit, match="run python -m sla_megatron.flags.support_page"):
        support_page.main(["--check", "--out", str(page)])


def test_the_readme_leads_to_it() -> None:
    assert "(docs/support.md)" in (ROOT / "README.md").read_text()


# The table and the checks.


def _raises_with_sla() -> dict[Row, range]:
    """Lines of each ``raise FlagError`` that ``--sla`` can meet, in the files that check what goes with it."""
    from sla_megatron.flags import pruned_rows, skipping, validation

    found = {}
    for file in (Path(module.__file__) for module in (validation, skipping, pruned_rows)):
        functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        # That one raises for settings without --sla alone.
        nodes = [node for one in functions if one.name != "resolve_sla_args" for node in ast.walk(one)]
        raised = [node for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
        assert {node.exc.func.id for node in raised} == {"FlagError"}
        found |= {(file.name, node.lineno): range(node.lineno, node.end_lineno + 1) for node in raised}
    return found


def _rows_of_validation() -> set[Row]:
    from sla_megatron.flags import dev, hybrid, validation

    tables = (*validation._REFUSED, *validation._REFUSED_FROM_0_20, *dev.REFUSED)
    rows = {(flag_of(name), accepted) for name, _, accepted in tables} | set(_raises_with_sla())
    return rows | {(flag_of(row.name), row.accepted) for row in hybrid.WITH_SLA}


def _row(error: FlagError) -> Row | None:
    """Which of them raised ``error``; ``None``: another check did."""
    *_, (frame, line) = walk_tb(error.__traceback__)
    file, raised = Path(frame.f_code.co_filename).name, _raises_with_sla()
    if file in {name for name, _ in raised}:
        return next(row for row, lines in raised.items() if row[0] == file and line in lines)
    return (error.flag, error.accepted)


def _table_faults(families: Sequence[Family], said: dict[str, StartError | None]) -> list[str]:
    """What is wrong between the table and the checks of the flags."""
    from sla_megatron.flags import core_attention, dev, entry_point

    found = support_page.faults(families, said)
    owners: dict[Row | None, set[str]] = defaultdict(set)
    named: dict[str, set[str]] = defaultdict(set)
    for family in families:
        for flags in family.refused:
            if isinstance(error := said[flags], FlagError):
                owners[_row(error)].add(family.name)
                named[error.flag].add(family.name)
    for row in _rows_of_validation():
        if len(owners[row]) != 1:
            found.append(f"validation {row}: in {len(owners[row])} families")
    # Where both refuse, it is the other's line that is shown.
    for name, _, _ in (*entry_point._NOT_HERE, *dev.NOT_HERE, *core_attention._REFUSED):
        if not named[flag_of(name)]:
            found.append(f"{flag_of(name)}: in no family")
    if (count := sum(family.is_refused for family in families)) > 5:
        found.append(f"{count} families are refused")
    return found


def test_what_works_is_accepted_and_what_is_refused_is_refused(said: dict[str, StartError | None]) -> None:
    """Each refusal that ``--sla`` brings belongs to one family, and at most five families have nothing that works."""
    assert _table_faults(FAMILIES, said) == []


def _with(*families: Family) -> Callable[[], tuple[Family, ...]]:
    return lambda: (*FAMILIES, *families)


def _without(flags: str) -> tuple[Family, ...]:
    """The table without one refused command line."""
    return tuple(
        replace(
            one,
            flags=tuple(words for words in one.flags if words != flags),
            limits=tuple(words for words in one.limits if words != flags),
        )
        for one in FAMILIES
    )


SOME_TEST = ("tests/test_parity.py::test_logits_and_every_gradient",)

#: A wrong table -> what is found.
WRONG: dict[str, tuple[Callable[[], Sequence[Family]], str]] = {
    "works, but is refused": (
        _with(Family("new", ("--multi-latent-attention",), SOME_TEST)),
        "new: --multi-latent-attention: --multi-latent-attention True: expected no multi-latent attention",
    ),
    "refused, but works": (
        _with(replace(WORKS[0], name="new", limits=("--bf16",))),
        "new: --bf16: is not refused",
    ),
    "refused by Megatron alone": (
        _with(replace(WORKS[0], name="new", limits=("--num-attention-heads 7",))),
        "new: --num-attention-heads 7: Megatron does not accept these flags",
    ),
    "a row that is missing": (lambda: _without("--qk-clip"), "'--qk-clip', "),
    "a check that is missing": (lambda: _without("--tensor-parallel-num-weight-shards 2"), "in 0 families"),
    "a row of the entry point that is missing": (lambda: _without("--fim-data"), "--fim-data: in no family"),
    "a row twice": (_with(replace(WORKS[0], name="new", limits=("--multi-latent-attention",))), "in 2 families"),
    "too many": (
        _with(*(Family(f"new {number}", ("--fim-data",)) for number in range(6))),
        f"{6 + len(REFUSED)} families are refused",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_is_found(said: dict[str, StartError | None], name: str) -> None:
    make, message = WRONG[name]
    families = make()
    known = said | _said([family for family in families if family not in FAMILIES])
    assert any(message in fault for fault in _table_faults(families, known))


def test_a_refusal_that_the_table_does_not_know_is_found(
    said: dict[str, StartError | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new row of the checks."""
    from sla_megatron.flags import validation

    row = ("squared_relu", (None, False), "no squares with --sla")
    monkeypatch.setattr(validation, "_REFUSED", (*validation._REFUSED, row))
    assert _table_faults(FAMILIES, said) == [f"validation {('--squared-relu', row[2])}: in 0 families"]


def test_every_group_of_megatrons_flags_is_there() -> None:
    """A flag of each group of its parser is in the table, or the page says that none is."""
    from megatron.training.arguments import add_megatron_arguments

    parser = ArgumentParser()
    add_megatron_arguments(parser)
    words = {word for family in FAMILIES for flags in (*family.flags, *family.limits) for word in flags.split()}
    # The first two are argparse's own.
    missing = [
        group.title
        for group in parser._action_groups[2:]
        if not words & {flag for action in group._group_actions for flag in action.option_strings}
    ]
    assert sorted(missing) == sorted(UNTESTED)


def test_the_plan_and_the_doctor_take_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each settles every command line that works in its own way, and says what is to be said of it."""
    from sla_megatron.commands.doctor.job import job_args, sizes
    from sla_megatron.commands.doctor.place import Place
    from sla_megatron.commands.plan.figures import Figures
    from sla_megatron.commands.plan.report import report
    from sla_megatron.commands.plan.settle import settled_job
    from sla_megatron.flags import entry_point, fused_kernels

    # As on a machine that has them, and every package.
    monkeypatch.setattr(fused_kernels, "switch_off_missing_kernels", lambda args: None)
    monkeypatch.setattr(entry_point, "NOT_INSTALLED", ())
    for flags in (flags for family in FAMILIES for flags in family.accepted):
        with monkeypatch.context() as patch:
            variables, words = support_page.in_words(flags)
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["sla-plan", *words])
            job = settled_job()
            assert f"GPUs: {job.num_gpus} = " in report(Figures.of(job)), flags
            args = job_args(Place(0, 1, 0, "here", launched=False), None, on_cpu=False)
            assert sizes(args).startswith(f"world size {job.num_gpus}: "), flags


# The table and the tests.


@cache
def _functions(file: str) -> dict[str, bool]:
    """Test functions of a file -> whether they are marked as for a GPU."""
    tree = ast.parse((ROOT / file).read_text())
    marks = [node.value for node in tree.body if isinstance(node, ast.Assign) and _target(node) == "pytestmark"]
    of_module = any(_says_gpu(mark) for mark in marks)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {one.name: of_module or any(map(_says_gpu, one.decorator_list)) for one in functions}


def _target(node: ast.Assign) -> str | None:
    return node.targets[0].id if isinstance(node.targets[0], ast.Name) else None


def _says_gpu(mark: ast.expr) -> bool:
    return any(ast.unparse(node) == "pytest.mark.gpu" for node in ast.walk(mark))


def _test_faults(families: Sequence[Family]) -> list[str]:
    """Tests that the table names and that there are not, or that do not run where the table says."""
    found = []
    for family in families:
        for name, needs_gpu in [(each, False) for each in family.tests] + [(each, True) for each in family.gpu_checks]:
            file, _, function = name.partition("::")
            if not (ROOT / file).is_file() or function not in _functions(file):
                found.append(f"{family.name}: no test {name}")
            elif _functions(file)[function] != needs_gpu:
                found.append(f"{family.name}: {name} {'needs no' if needs_gpu else 'needs a'} GPU")
    return found


def test_every_test_is_there() -> None:
    """Those of ``works`` run without a GPU, the checks of GPUs do not."""
    assert _test_faults(FAMILIES) == []


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (Family("new", (), ("tests/test_parity.py::test_nothing",)), "no test tests/test_parity.py::test_nothing"),
        (Family("new", (), ("tests/test_nothing.py::test_nothing",)), "no test tests/test_nothing.py::test_nothing"),
        (Family("new", (), ("tests/test_gpu.py::test_reference",)), "test_reference needs a GPU"),
        (Family("new", (), (), SOME_TEST), "test_logits_and_every_gradient needs no GPU"),
    ],
    ids=["function", "file", "GPU", "no GPU"],
)
def test_a_wrong_test_is_found(family: Family, message: str) -> None:
    (fault,) = _test_faults([*FAMILIES, family])
    assert message in fault


def test_the_tables_are_told_apart() -> None:
    """What works names tests, what is refused does not; a name is one family's."""
    assert [family.name for family in WORKS if family.is_refused] == []
    assert [family.name for family in REFUSED if not family.is_refused] == []
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
