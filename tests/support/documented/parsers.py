"""The flags that each command knows, asked of its own parser."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from typing import Any
from unittest import mock

from sla_megatron.common.silence import silence, without_announcements
from sla_megatron.cpu.device import add_device_arg, megatron_device
from sla_megatron.flags.families import OF_OTHER_VERSIONS
from sla_megatron.flags.sla_flags import add_sla_args

#: Those that take Megatron's flags and no others.
TRAINING = (
    "sla_megatron.pretrain_gpt",
    "examples.value_residual.pretrain",
    "examples.own_script.pretrain_my_gpt",
)
#: Those that take a run's flags beside their own.
BESIDE_A_RUN = ("sla_megatron.commands.plan.cli", "sla_megatron.commands.doctor.cli")


class _Found(BaseException):
    """Carries a command's parser out of the command."""

    def __init__(self, parser: ArgumentParser) -> None:
        self.parser = parser


@functools.cache
def training_flags() -> frozenset[str]:
    """Of a run: Megatron's parser's, of every supported version, and this project's."""
    with silence(), without_announcements(), megatron_device(["--device", "cpu"]):
        from megatron.training.arguments import add_megatron_arguments

        parser = add_device_arg(add_sla_args(add_megatron_arguments(ArgumentParser(allow_abbrev=False))))
    return frozenset(parser._option_string_actions) | set(OF_OTHER_VERSIONS) | {"--help-sla"}


@functools.cache
def parser_of(module: str) -> ArgumentParser:
    """What ``main`` of the module, or the module's ``__main__``, would parse its command line with."""
    if module == "sla_megatron.commands.evaluate.cli":
        with silence():
            from lm_eval._cli import HarnessCLI
        return HarnessCLI()._parser

    def found(parser: ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Found(parser)

    with without_announcements():
        imported = importlib.import_module(module)
        if hasattr(imported, "__path__"):
            imported = importlib.import_module(f"{module}.__main__")
    # Words, as some commands answer none before they parse; and what they set for themselves is not for who asks.
    words, environment = mock.patch.object(sys, "argv", [module, "word"]), mock.patch.dict(os.environ)
    with words, environment, mock.patch.object(ArgumentParser, "parse_known_args", found):
        try:
            imported.main()
        except _Found as carried:
            return carried.parser
    raise AssertionError(f"{module} parses no command line")


@functools.cache
def sbatch_flags() -> frozenset[str] | None:
    """Slurm's, where it is installed; it lists them only where it finds a cluster's settings, of whatever cluster."""
    if shutil.which("sbatch") is None:
        return None
    with tempfile.NamedTemporaryFile("w", suffix="slurm.conf") as settings:
        settings.write("ClusterName=none\nSlurmctldHost=localhost\n")
        settings.flush()
        own = os.environ | {"SLURM_CONF": settings.name}
        listed = subprocess.run(["sbatch", "--help"], env=own, capture_output=True, text=True, timeout=60, check=True)
    return frozenset(re.findall(r"(?<!\S)--?[A-Za-z][a-z-]*", listed.stdout))


def subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """Name -> parser."""
    return {
        name: chosen
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, chosen in action.choices.items()
    }
