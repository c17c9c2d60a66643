"""Which Megatron will be imported, and whether this project was checked with it."""

from __future__ import annotations

import ast
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..common.errors import StartError
from .flavours import FLAVOURS, Flavour, flavour_of
from .seams import SeamError

#: Line of development -> what every seam was read against and tested with.
CHECKED_WITH = {flavour.name: flavour.checked for flavour in FLAVOURS}

#: A package that Megatron need not have, and the oldest beside which it can be imported.
RESILIENCY, OLDEST_RESILIENCY = "nvidia-resiliency-ext", (0, 6)

#: Where Megatron keeps its version, in a checkout.
VERSION_FILE = Path("megatron/core/package_info.py")


#: How to have one that was checked.
INSTALL = "pip install 'megatron-core[training]==0.19.*'"


class MegatronVersionError(SeamError, StartError):
    """There is no Megatron, or one that this project was not checked with: one line."""


def version_in(package_info: Path) -> str | None:
    """Such as ``"0.19.2"``, of Megatron's ``package_info.py``; ``None`` if it does not say.  Raises ``OSError``."""
    found: dict[str, object] = {}
    try:
        statements = ast.parse(package_info.read_bytes()).body
    except (SyntaxError, ValueError):
        return None
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            found |= {target.id: statement.value.value for target in statement.targets if isinstance(target, ast.Name)}
    numbers = [found.get(name) for name in ("MAJOR", "MINOR", "PATCH")]
    if not all(isinstance(number, int) for number in numbers):
        return None
    return ".".join(map(str, numbers)) + str(found.get("PRE_RELEASE") or "")


def require_megatron() -> str:
    """The version of the Megatron that will be imported, as it says.

    Raises:
        MegatronVersionError: if there is none, or one that this project was not checked with.
    """
    version, _ = _found()
    _require_resiliency()
    return version


def megatron_flavour() -> Flavour:
    """The line of development of the Megatron that will be imported.  Raises as :func:`require_megatron`."""
    return _found()[1]


def megatron_origin() -> Path | None:
    """The file that Megatron's core would be imported from; ``None`` where there is no Megatron."""
    try:
        core = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    return None if core is None or core.origin is None else Path(core.origin)


def _found() -> tuple[str, Flavour]:
    if (origin := megatron_origin()) is None:
        raise MegatronVersionError(f"Megatron is not installed: {INSTALL}")
    try:
        version = version_in(origin.with_name(VERSION_FILE.name))
        return version, flavour_of(version, origin.parent)
    except OSError as error:
        raise MegatronVersionError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except SeamError as error:
        raise MegatronVersionError(f"{origin}: {error}") from error


def _require_resiliency() -> None:
    """Raise :class:`MegatronVersionError` for an old package, on which Megatron ends in a traceback when imported."""
    try:
        found = version(RESILIENCY)
    except PackageNotFoundError:
        return
    if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < OLDEST_RESILIENCY:
        oldest = ".".join(map(str, OLDEST_RESILIENCY))
        raise MegatronVersionError(f"{RESILIENCY} {found} is installed: Megatron needs {oldest} or newer, or none")
