"""The entries of a grid's ``sla``: each is the product of its lists, a setting of skip-layer attention each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...attention.sla_config import DEFAULT_SHARE, KV_PROJECTIONS, SHARES, SLAConfig
from ...common.errors import FlagError
from ...flags.skipping import parse_layers
from .equal_parameters import Widths
from .errors import GridError
from .flag_words import Shape
from .setting import Setting
from .values import chosen, known, listed, share

#: What says where skip groups read, one of them an entry -> the coordinate, and whether a setting has several.
_READ = {
    "distance": ("distances", False),
    "distances": ("distances", True),
    "source": ("sources", False),
    "sources": ("sources", True),
}
_KEYS = (*_READ, "share", "skip-groups", "kv-projection", "layers", "parameters", "name")
_RANGE = r"\d+(-\d*(/\d+)?)?"
_RANGES = re.compile(rf"{_RANGE}(,{_RANGE})*")
#: The value of ``parameters``.
_AS_DENSE = "dense"


@dataclass(frozen=True)
class Model:
    """One size, context and seed: what an entry's shares are of.

    Attributes:
        size: its name in the grid.
        flags: all of a dense run's.
        shape: read off them.
    """

    size: str
    flags: Sequence[str]
    shape: Shape


def entries_of(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Each entry of ``sla`` with its key, such as ``sla[0]``."""
    if value == []:
        return []
    found = []
    for number, entry in enumerate(listed("sla", value)):
        if not isinstance(entry, dict):
            raise GridError(f"sla[{number}]", entry, f"a mapping of {', '.join(_KEYS)}")
        known(entry, _KEYS, f"sla[{number}].")
        first, *others = [key for key in _READ if key in entry] or [None]
        if others:
            raise GridError(f"sla[{number}].{others[0]}", entry[others[0]], f"no {first} beside it")
        name = entry.get("name", "a name")
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise GridError(f"sla[{number}].name", name, "a name for reports, such as SkipV1Former")
        found.append((f"sla[{number}]", entry))
    return found


def settings_of(key: str, entry: dict[str, Any], model: Model) -> Iterator[Setting]:
    """Those of one entry, for ``model``: the product of its lists."""
    shape = model.shape
    coordinate, read = _read(key, entry, shape.num_layers)
    groups = [
        share(f"{key}.skip-groups", one, shape.num_groups)
        for one in listed(f"{key}.skip-groups", entry.get("skip-groups", DEFAULT_SHARE))
    ]
    for number in groups:
        if number > shape.num_groups:
            accepted = f"at most {shape.num_groups}, the K/V groups of size {model.size}"
            raise GridError(f"{key}.skip-groups", number, accepted)
    projections = chosen(f"{key}.kv-projection", entry.get("kv-projection", KV_PROJECTIONS[0]), KV_PROJECTIONS)
    shares = chosen(f"{key}.share", entry.get("share", next(iter(SHARES))), SHARES)
    widens = "parameters" in entry
    if widens and entry["parameters"] != _AS_DENSE:
        raise GridError(f"{key}.parameters", entry["parameters"], f"{_AS_DENSE}, or no {key}.parameters")
    product = itertools.product(read, groups, projections, _layers(key, entry), shares)
    for one, number, projection, layers, shared in product:
        setting = Setting(
            **{coordinate: one},
            skip_groups=number,
            kv_projection=projection,
            layers=layers,
            share=shared,
            label=entry.get("name"),
        )
        yield _widened(key, setting, model) if widens else setting


def _read(key: str, entry: dict[str, Any], num_layers: int) -> tuple[str, list[tuple[int, ...]]]:
    """Whether distances or sources are given, and those of each setting."""
    name = next((name for name in _READ if name in entry), "distance")
    coordinate, has_several = _READ[name]
    given = listed(f"{key}.{name}", entry.get(name, DEFAULT_SHARE))
    if not has_several:
        given = [[one] for one in given]
    elif not all(isinstance(several, list) and several for several in given):
        raise GridError(f"{key}.{name}", given, "a list of lists, such as [[2, 4]]")
    found = [tuple(share(f"{key}.{name}", one, num_layers) for one in several) for several in given]
    for one in itertools.chain(*found) if coordinate == "sources" else ():
        if one > num_layers:
            raise GridError(f"{key}.{name}", one, f"at most {num_layers}, the layers")
    return coordinate, found


def _layers(key: str, entry: dict[str, Any]) -> list[str | None]:
    if "layers" not in entry:
        return [None]
    found: list[str | None] = []
    for one in listed(f"{key}.layers", entry["layers"]):
        text = str(one).replace(" ", "")
        if not _RANGES.fullmatch(text):
            raise GridError(f"{key}.layers", one, "layers such as 5-8 or 4,6,8-12")
        found.append(text)
    return found


def _widened(key: str, setting: Setting, model: Model) -> Setting:
    """``setting`` with an MLP so wide that it has the dense model's parameters; itself where it leaves nothing out."""
    if setting.kv_projection == "full":
        return setting
    widths = Widths.of_flags(f"{key}.parameters", model.flags, model.shape.num_heads)
    width = widths.widened(_sla_config(key, setting, model.shape))
    return setting if width == widths.ffn_hidden_size else replace(setting, ffn_hidden_size=width)


def _sla_config(key: str, setting: Setting, shape: Shape) -> SLAConfig:
    """What the run's flags will say, as ``flags.skipping`` makes it of Megatron's arguments."""
    try:
        layers = None if setting.layers is None else parse_layers(setting.layers, shape.num_layers)
    except FlagError as error:
        raise GridError(f"{key}.layers", setting.layers, f"layers within 1-{shape.num_layers}") from error
    return SLAConfig(
        num_layers=shape.num_layers,
        num_query_groups=shape.num_groups,
        skip_distances=setting.distances,
        num_skip_groups=setting.skip_groups,
        layers=layers,
        kv_projection=setting.kv_projection,
        share=setting.share,
        source_layers=setting.sources,
    )
