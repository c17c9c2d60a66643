"""``sla-patch registry``: what this project touches of Megatron and torch, and whether a checkout has it."""

from __future__ import annotations

import sys
import warnings
from itertools import groupby

from ...upstream.megatron_version import CHECKED_WITH, require_megatron
from .checkout import Checkout


def print_registry(checkout: Checkout | None) -> int:
    """Print every name with its reason; with ``checkout``, check its Megatron instead of listing reasons.

    Returns 0, or 1 if a name does not fit.  Raises ``PatchError`` or ``MegatronVersionError``.
    """
    if checkout is not None:
        # The checkout's version is not asked for: what is wanted is how far another one fits.
        checkout.require_megatron()
        sys.path.insert(0, str(checkout.folder.resolve()))
    else:
        require_megatron()
    with warnings.catch_warnings(action="ignore"):
        return _print_fits() if checkout else _print_reasons()


def _print_reasons() -> int:
    from .registry import is_replaced, registry

    print("checked with Megatron " + "; ".join(f"{minor} ({what})" for minor, what in CHECKED_WITH.items()))
    for when, entries in groupby(registry(), lambda entry: entry.when):
        print(f"\n{when}:")
        for entry in entries:
            for index, form in enumerate(entry.forms):
                other = "  or " if index else "  "
                print(f"{other}{form.target}{'' if is_replaced(form) else ' (not replaced)'}\n      {form.reason}")
                if form.sources:
                    print(f"      its source as in {' or '.join(form.sources.values())}, and no other")
    return 0


def _print_fits() -> int:
    try:
        from .registry import registry
    except ImportError as error:
        print(f"does not fit: {error}")
        return 1
    misfits = {entry.targets: entry.misfit() for entry in registry()}
    for misfit in filter(None, misfits.values()):
        print(f"does not fit: {misfit}")
    print(f"{sum(misfit is None for misfit in misfits.values())} of {len(misfits)} names fit")
    return int(any(misfits.values()))
