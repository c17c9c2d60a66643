"""Settings that there were when keys and values could not be told apart mean what they meant, layer by layer.

Written out from the class as it was then.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sla_megatron.attention.sla_config import SLAConfig

DENSE = ("1111 2222 3333 4444 5555", "---- ---- ---- ---- ----", "xxxx xxxx xxxx xxxx xxxx", 0)

#: The arguments -> of each group of each layer which layer it reads, which later layer reads it, and whether it is
#: live; and how many are dead.
BEFORE: list[tuple[tuple, str, str, str, int]] = [
    ((4, 4, (3,), 3), "1111 2222 3333 4111", "-444 ---- ---- ----", "xxxx xxxx xxxx x---", 3),
    ((4, 4, (1,), 3), "1111 2111 3222 4333", "-222 -333 -444 ----", "xxxx xxxx xxxx x---", 3),
    ((4, 4, (1,), 4), "1111 1111 2222 3333", "2222 3333 4444 ----", "xxxx xxxx xxxx ----", 4),
    ((4, 4, (2, 1), 4), "1111 2121 1212 2323", "3232 4343 -4-4 ----", "xxxx xxxx -x-x ----", 6),
    ((4, 4, (1, 2, 3), 3), "1111 2122 3213 4321", "-234 -34- -4-- ----", "xxxx xxxx xx-x x---", 4),
    ((4, 2, (3,), 1), "11 22 33 41", "-4 -- -- --", "xx xx xx x-", 1),
    ((4, 4, (3,), 3, None, "pruned"), "1111 2222 3333 4111", "-444 ---- ---- ----", "xxxx xxxx xxxx x---", 3),
    (
        (6, 4, (1,), 3, (3, 4, 5, 6)),
        "1111 2222 3222 4333 5444 6555",
        "---- -333 -444 -555 -666 ----",
        "xxxx xxxx xxxx xxxx xxxx x---",
        3,
    ),
    (
        (6, 4, (2,), 2, (3, 6)),
        "1111 2222 3131 4444 5555 6464",
        "-3-3 ---- ---- -6-6 ---- ----",
        "xxxx xxxx x-x- xxxx xxxx x-x-",
        4,
    ),
    (
        (6, 6, (2, 3), 5, (4, 6), "pruned"),
        "111111 222222 333333 421212 555555 643434",
        "--4-4- -4-4-4 --6-6- -6-6-6 ------ ------",
        "xxxxxx xxxxxx xxxxxx xx-x-x xxxxxx x-----",
        7,
    ),
    ((5, 3, (4,), 2, (5,)), "111 222 333 444 511", "-55 --- --- --- ---", "xxx xxx xxx xxx x--", 2),
    (
        (8, 6, (6,), 4),
        "111111 222222 333333 444444 555555 666666 711711 822822",
        "-77-77 -88-88 ------ ------ ------ ------ ------ ------",
        "xxxxxx xxxxxx xxxxxx xxxxxx xxxxxx xxxxxx x--x-- x--x--",
        8,
    ),
    ((5, 4, (5,), 3), *DENSE),
    ((5, 4, (1,), 0), *DENSE),
]


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize(("arguments", "sources", "readers", "live", "dead"), BEFORE, ids=lambda value: str(value))
def test_as_before(arguments: tuple, sources: str, readers: str, live: str, dead: int, kind: str) -> None:
    """Of keys and of values alike."""
    sla = SLAConfig(*arguments)
    groups = range(sla.num_query_groups)

    def spelled(letter: Callable[[int, int], str]) -> str:
        return " ".join("".join(letter(m, g) for g in groups) for m in range(1, sla.num_layers + 1))

    assert spelled(lambda m, g: str(sla.source_of(m, g, kind))) == sources
    assert spelled(lambda m, g: "".join(map(str, sla.readers(m, g, kind))) or "-") == readers
    assert spelled(lambda m, g: "x" if sla.is_live(m, g, kind) else "-") == live
    assert sla.num_dead(kind) == dead
    kept = spelled(lambda m, g: "x" if g in sla.projected_groups(m, kind) else "-")
    assert kept == (live if sla.kv_projection == "pruned" else live.replace("-", "x"))


def test_the_defaults_of_what_is_new() -> None:
    """Keys and values, at a distance."""
    sla = SLAConfig(4, 4, (3,), 3)
    assert (sla.share, sla.source_layers, sla.shared_kinds) == ("kv", (), ("key", "value"))
