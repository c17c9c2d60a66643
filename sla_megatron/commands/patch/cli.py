"""``sla-patch``: --sla in pretrain_gpt.py and pretrain_hybrid.py of your own Megatron-LM checkout.

sla-patch check DIR
sla-patch apply DIR
sla-patch revert DIR
sla-patch registry [DIR]

DIR is a checkout of a supported version.  Exit status: 0 done, or applied; 1 check: not applied; registry: a name does
not fit; 2 it cannot be done, and nothing was changed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ...common.errors import one_line_errors
from ...common.flag_types import OneLineParser
from .checkout import Checkout
from .diff import Diff


def main() -> None:
    """Run one command.  What cannot be done ends it: one line on stderr, exit status 2."""
    arguments = _parser().parse_args()
    try:
        with one_line_errors("sla-patch", all_ranks=True):
            status = arguments.command(arguments.checkout)
    except BrokenPipeError:  # Whoever reads has read enough, as head.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="sla-patch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("check", _check, "whether the patch is applied, and whether it fits"),
        ("apply", _apply, "apply the patch; once or twice is the same"),
        ("revert", _revert, "take the patch back"),
    ):
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.add_argument("checkout", metavar="DIR", type=lambda path: Checkout(Path(path)))
        subparser.set_defaults(command=command)
    registry = commands.add_parser(
        "registry",
        help="every name of Megatron and torch that this project replaces or relies on; with DIR, whether each fits",
    )
    registry.add_argument("checkout", metavar="DIR", nargs="?", type=lambda path: Checkout(Path(path)))
    registry.set_defaults(command=_registry)
    return parser


def _check(checkout: Checkout) -> int:
    applied = checkout.applied()
    for diff in checkout.patch.diffs:
        found = "is applied" if diff in applied else "fits, not applied"
        print(f"{checkout.script(diff)}: {checkout.patch.name} {found} ({checkout.description})")
    return 0 if len(applied) == len(checkout.patch.diffs) else 1


def _apply(checkout: Checkout) -> int:
    return _say(checkout, checkout.apply(), "applied", "was applied already, nothing changed:")


def _revert(checkout: Checkout) -> int:
    return _say(checkout, checkout.revert(), "took back", "was not applied, nothing changed:")


def _say(checkout: Checkout, done: list[Diff], changed: str, unchanged: str) -> int:
    scripts = {diff.path for diff in done}
    for diff in checkout.patch.diffs:
        what = changed if diff.path in scripts else unchanged
        print(f"{checkout.script(diff)}: {what} {checkout.patch.name} ({checkout.description})")
    return 0


def _registry(checkout: Checkout | None) -> int:
    from .registry_command import print_registry

    return print_registry(checkout)


if __name__ == "__main__":
    main()
