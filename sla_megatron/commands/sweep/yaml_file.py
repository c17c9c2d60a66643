"""A YAML file as a mapping; a key that comes twice is an error, where YAML's readers keep the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import SweepError


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in ``path``.  Raises :class:`SweepError`, one line with the place of the fault."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"{path}: {getattr(error, 'strerror', None) or 'no text'}: expected a YAML file") from error
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise SweepError(f"{path}{place}: {' '.join(problem.split())}: expected YAML") from error
    if not isinstance(value, dict):
        raise SweepError(f"{path}: {type(value).__name__}: expected a mapping, as in examples/sweep/tiny.yaml")
    return value
