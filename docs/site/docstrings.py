"""Docstrings as the site shows them: roles such as ``:class:`~sla_megatron.SLAConfig``` become code.

An extension of griffe, which reads the sources for mkdocstrings (``mkdocs.yml``).
"""

from __future__ import annotations

import re
from typing import Any

import griffe

#: A role of reStructuredText; of a name that begins with ~ the last part is shown.
_ROLE = re.compile(r":(?:py:)?[a-z]+:`(~?)([^`]+)`")


class Roles(griffe.Extension):
    """Puts code in the place of roles, object by object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object, its members included."""
        if obj.docstring is not None:
            obj.docstring.value = without_roles(obj.docstring.value)


def without_roles(text: str) -> str:
    """``text`` with code in the place of each role."""
    return _ROLE.sub(lambda match: f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`", text)
