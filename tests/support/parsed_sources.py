"""Megatron's own source files, which it reads and parses for its flags' help, twice a run: once a process.

Of a class Python parses the whole file that it is in.  A process that is forked from one that has done so has it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

_getsource, _parse = inspect.getsource, functools.cache(ast.parse)
_source_of_class = functools.cache(inspect.getsource)


def _source(of: Any) -> str:
    return _source_of_class(of) if inspect.isclass(of) else _getsource(of)


@contextlib.contextmanager
def parsed_once(trees: bool = True) -> Iterator[None]:
    """While entered, what was read and parsed in this or an earlier block is not again.

    Args:
        trees: syntax trees too, for processes of Megatron's own: nobody may change what others are given.
    """
    before = inspect.getsource, ast.parse
    inspect.getsource = _source
    if trees:
        ast.parse = _parse
    try:
        yield
    finally:
        inspect.getsource, ast.parse = before


def parse_ahead() -> None:
    """What Megatron's parser of its flags reads."""
    from megatron.training.arguments import add_megatron_arguments

    with parsed_once():
        add_megatron_arguments(argparse.ArgumentParser())
