"""``sla-job show``: how a run is doing."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ...common.errors import FlagError
from .arguments import add_run
from .chain import Chain

HELP = "print the attempts so far"


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)


def run(args: Namespace) -> int:
    if not (args.run / "chain.json").exists():
        raise FlagError("--run", args.run, "a run's folder, with the chain.json that its first attempt makes")
    for number, attempt in enumerate(Chain.read(args.run).attempts, 1):
        until = f"{attempt.ended} at iteration {attempt.ended_at}, {attempt.how}" if attempt.ended else "now"
        print(f"{number:3}  job {attempt.job} on {attempt.nodes}: {attempt.began} at {attempt.began_at} to {until}")
    return 0
