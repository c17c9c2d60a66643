"""Whether the page of public names has each of them, once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

PAGE = "docs/api.md"


def entries(root: Path) -> list[str]:
    """What mkdocstrings describes there, by full name."""
    return re.findall(r"^::: (\S+)$", (root / PAGE).read_text(), re.MULTILINE)


def wrong_names(root: Path, home: Mapping[str, str]) -> list[str]:
    """Names of ``home`` (public name -> module in the package) without an entry, and entries of others."""
    found = entries(root)
    public = [f"sla_megatron.{module}.{name}" for name, module in home.items()]
    return [
        *(f"{PAGE}: {name}: no entry of a public name" for name in public if name not in found),
        *(f"{PAGE}: {name}: no public name" for name in found if name not in public),
        *(f"{PAGE}: {name}: two entries" for name in sorted(set(found)) if found.count(name) > 1),
    ]
