"""Megatron is of a version that this project was checked with, and every name it touches looks as expected."""

from __future__ import annotations

from ...upstream.megatron_version import megatron_flavour, require_megatron
from ...upstream.seams import SeamError
from .finding import Fault


def megatron_release() -> str:
    """The version that will be imported is one of those that are supported.  Needs no import of Megatron."""
    try:
        return megatron_flavour().described(require_megatron())
    except SeamError as error:
        raise Fault(str(error).removeprefix("sla-megatron: error: ")) from error


def upstream_names() -> str:
    """All names of the registry exist and have the expected parameters; nothing is replaced.

    Call where Megatron may be imported: on a GPU, or inside the CPU backend, which checked its own names on entering.
    """
    from ..patch.registry import CPU, is_replaced, registry

    entries = [entry for entry in registry() if entry.when != CPU]
    misfits = [misfit for entry in entries if (misfit := entry.misfit()) is not None]
    if misfits:
        more = f" (and {len(misfits) - 1} more: sla-patch registry lists all names)" if len(misfits) > 1 else ""
        raise Fault(f"{misfits[0]}{more}")
    replaced = sum(is_replaced(entry.name.fitting()) for entry in entries)
    return f"{replaced} replaced names and {len(entries) - replaced} relied on look as expected"
