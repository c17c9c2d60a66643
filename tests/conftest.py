"""Fixtures that several files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support import cards
from tests.support.parsed_sources import parsed_once
from tests.support.slurm import Cluster, cluster

_ENVIRONMENT: dict[str, str] = {}


def pytest_collection_finish() -> None:
    """Note the environment that the first test finds."""
    _ENVIRONMENT.update(os.environ)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, bool, bool]:
    """Each file's tests find the environment that the first did, whatever those of others, and imports, have set.

    Ranks in another environment are not forked (``support/launch.py``): each takes ten CPU seconds more.
    """
    done = yield
    if nextitem is None or nextitem.path != item.path:
        for name in os.environ.keys() - _ENVIRONMENT.keys():
            del os.environ[name]
        os.environ.update(_ENVIRONMENT)
    return done


@pytest.fixture(scope="session", autouse=True)
def sources_read_once() -> Iterator[None]:
    """Whoever parses a command line of Megatron's has it read these sources."""
    with parsed_once(trees=False):
        yield


@pytest.fixture
def card(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``card(workflow, command, results)``, after all assertions: what ``make cards`` notes of the test."""
    return partial(cards.leave, request.node.nodeid, os.environ.get(cards.VARIABLE))


@pytest.fixture
def convert_streams(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """``sla-convert`` with these words: its exit status, and what it wrote on stdout and on stderr."""
    from sla_megatron.commands.convert import cli

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sla-convert", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def convert(convert_streams: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str]]:
    """Likewise: its exit status, and what it wrote on both streams."""

    def run(*words: str | Path) -> tuple[int, str]:
        status, out, err = convert_streams(*words)
        return status, out + err

    return run


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of three nodes, with a folder ``runs``."""
    with cluster(tmp_path_factory.mktemp("slurm"), 3) as made:
        (made.folder / "runs").mkdir()
        yield made


@pytest.fixture(scope="module")
def sources_parsed_once() -> Iterator[None]:
    """For its flags' help Megatron parses its own source files, for every command line; here on one rank, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        with parsed_once():
            yield
