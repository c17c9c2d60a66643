"""The picture of who reads whom: what it shows, read back from the file, and that it can be read."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.commands.plan import draw
from sla_megatron.commands.plan.compute import ModelWork
from sla_megatron.commands.plan.flags import add_plan_args, check_plan_args
from sla_megatron.commands.plan.job import Job
from sla_megatron.common.errors import FlagError
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.payload import MicrobatchShape

from ...strategies import layouts, sla_configs
from .variants import TENSORS, readers, source

SVG = "{http://www.w3.org/2000/svg}"


def job_of(
    sla: SLAConfig, layout: PipelineLayout | None = None, kinds: str = "", description: str = "some skip"
) -> Job:
    """A run with that pattern."""
    layers = len(kinds) or sla.num_layers
    return Job(
        sla=sla,
        layout=layout or PipelineLayout.of_sizes(1, [layers]),
        shape=MicrobatchShape(24, 2, 16),
        work=ModelWork(num_heads=sla.num_query_groups, head_size=4, mlp_weights=(64,) * layers, kinds=kinds),
        element_bytes=2,
        num_gpus=1,
        global_batch_size=2,
        description=description,
    )


class Read:
    """What a reader sees: texts and where they are, shapes by their class; the legend left out of these."""

    def __init__(self, drawn: bytes) -> None:
        self.root = ElementTree.fromstring(drawn)
        self.texts = [(node.text, node.get("class"), self._box(node)) for node in self.root.iter(f"{SVG}text")]
        self.rows = {
            int(words.split()[1]): (box[1] + box[3]) / 2 for words, _, box in self.texts if re.match(r"layer \d", words)
        }
        self.columns = [(box[0] + box[2]) / 2 for _, kind, box in self.texts if kind == "c"]

    @staticmethod
    def _box(node: ElementTree.Element) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of a text in DejaVu Sans Mono, the widest of the usual fonts."""
        kind, x, y = node.get("class"), float(node.get("x")), float(node.get("y"))
        size = 10 if kind == "n" else 12
        width = len(node.text) * size * 0.602
        left = x - width / 2 if kind in "cn" else x
        return left, y - 0.76 * size, left + width, y + 0.1 * size

    def starts(self, kind: str) -> list[tuple[float, float]]:
        """Where the shapes of a class begin."""
        ways = [node.get("d") for node in self.root.iter(f"{SVG}path") if kind in (node.get("class") or "").split()]
        found = [tuple(map(float, place)) for way in ways for place in re.findall(r"M([\d.]+) ([\d.]+)", way)]
        return [place for place in found if place[1] < max(self.rows.values()) + 12]

    def cell(self, place: tuple[float, float]) -> tuple[str, int, int]:
        """(kind, layer, group) of the half cell at a place."""
        x, y = place
        group = min(range(len(self.columns)), key=lambda column: abs(self.columns[column] - x))
        return "key" if x < self.columns[group] else "value", self.layer(y), group

    def layer(self, y: float) -> int:
        return min(self.rows, key=lambda layer: abs(self.rows[layer] - y))

    def cells(self, kind: str) -> list[tuple[str, int, int]]:
        """The half cells that have a shape of that class."""
        return [self.cell((x + 1, y)) for x, y in self.starts(kind)]

    def named(self) -> dict[tuple[str, int, int], int]:
        """The layers that cells name."""
        below = max(self.rows.values()) + 12
        numbers = [(words, box) for words, _, box in self.texts if words.isdecimal() and box[3] < below]
        inside = [(words, box) for words, box in numbers if box[1] > min(self.rows.values()) - 12]
        return {self.cell(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)): int(words) for words, box in inside}

    def arcs(self, kind: str) -> list[tuple[int, int]]:
        """(from, to) of the arcs of a kind."""
        ways = [node.get("d") for node in self.root.iter(f"{SVG}path") if (node.get("class") or "").startswith(kind)]
        found = [re.fullmatch(r"M[\d.]+ ([\d.]+)C.* ([\d.]+)", way) for way in ways]
        return [(self.layer(float(one[1]) - 3), self.layer(float(one[2]) + 3)) for one in found if one]


@given(sla_configs())
def test_who_reads_whom(sla: SLAConfig) -> None:
    """Each half cell, each arc and each mark, against the specification's words."""
    drawn, reading = Read(draw.picture(job_of(sla))), readers(sla)
    others = {(kind, m, g): source(sla, m, g, kind) for kind, m, g in reading if source(sla, m, g, kind) != m}
    assert drawn.named() == others
    for kind in TENSORS["kv"]:
        of_kind = [tensor for tensor in reading if tensor[0] == kind]
        own = [tensor for tensor in of_kind if tensor not in others]
        assert sorted(drawn.cells(kind)) == sorted(own)
        assert sorted(drawn.cells(f"{kind}-of")) == sorted(set(of_kind) - set(own))
        assert sorted(drawn.cells(f"{kind}-for")) == sorted(one for one in of_kind if set(reading[one]) - {one[1]})
        pairs = {(of, layer) for (what, layer, _), of in others.items() if what == kind}
        assert sorted(drawn.arcs(f"{kind}-way")) == sorted(pairs)
    # A cross is two strokes.
    dead = [tensor for tensor, found in reading.items() if not found]
    assert sorted(drawn.cells("x")) == sorted(2 * dead)


@given(st.data(), sla_configs(), st.sampled_from(["", "*-", "M*"]), st.integers(0, 300))
def test_it_can_be_read(data: st.DataObject, sla: SLAConfig, kinds: str, length: int) -> None:
    """No text lies on another one or beyond the picture's edge, whatever the model and its pipeline."""
    kinds *= sla.num_layers
    layout = data.draw(layouts(len(kinds) or sla.num_layers))
    drawn = Read(draw.picture(job_of(sla, layout, kinds, "x y " * (length // 4))))
    width, height = (float(drawn.root.get(name)) for name in ("width", "height"))
    assert drawn.root.get("viewBox") == f"0 0 {width:g} {height:g}"
    for words, _, (left, top, right, bottom) in drawn.texts:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, words
    for (words, _, one), (others, _, other) in combinations(drawn.texts, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, f"{words} on {others}"


def test_stages_are_told_apart() -> None:
    """Two ranks, two stages each, one of them empty: dashed between layers of different stages, each named."""
    sla = SLAConfig(6, 2, (3,), 1)
    drawn = Read(draw.picture(job_of(sla, PipelineLayout.of_sizes(2, (2, 0, 1, 3)))))
    middles = [(drawn.rows[after] + drawn.rows[after + 1]) / 2 for after in (2, 3)]
    assert [y for _, y in drawn.starts("b")] == pytest.approx(middles, abs=2)
    at = {words: drawn.layer((box[1] + box[3]) / 2) for words, _, box in drawn.texts if words.startswith("stage")}
    assert at.keys() == {"stage 0, rank 0", "stage 2, rank 0", "stage 3, rank 1"}
    assert (at["stage 2, rank 0"], at["stage 3, rank 1"]) == (3, 5)
    alone = Read(draw.picture(job_of(sla)))
    assert alone.starts("b") == [] and not any(words.startswith("stage") for words, _, _ in alone.texts)


def test_layers_of_a_hybrid_model_have_both_numbers() -> None:
    drawn = Read(draw.picture(job_of(SLAConfig(2, 2, (1,), 1), PipelineLayout.of_sizes(1, [5]), "M*-*-")))
    assert [words for words, _, _ in drawn.texts if words.startswith("layer")][:2] == [
        "layer 1 (2 of 5)",
        "layer 2 (4 of 5)",
    ]


def test_the_same_bytes_each_time() -> None:
    of = job_of(SLAConfig(12, 4, (), 3, None, "full", "values", (1, 5)))
    assert draw.picture(of) == draw.picture(replace(of, sla=replace(of.sla)))


def test_as_text() -> None:
    """Values of layer 1 in two of four groups, of which layer 3 alone is no consumer; layers 1-2 are a stage."""
    sla = SLAConfig(4, 4, (), 2, (2, 4), "full", "values", (1,))
    lines = draw.text(job_of(sla, PipelineLayout.of_sizes(2, (2, 2)))).splitlines()
    assert lines[0] == "SLA: some skip" and "Each layer's values" in lines[1]
    assert [line.split() for line in lines[2:]] == [
        "layer 0 1 2 3 stage".split(),
        "1 . . . . 0 (rank 0)".split(),
        "2 . 1x . 1x 0 (rank 0)".split(),
        "3 . . . . 1 (rank 1)".split(),
        "4 . 1x . 1x 1 (rank 1)".split(),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--draw", "--draw without a value: expected a file name"),
        ("--draw a.png", "--draw a.png: expected a file name that ends in .svg, or -"),
        ("--draw no/such/a.svg", "--draw no/such/a.svg: expected a file in a directory that exists"),
        ("--draw - --json -", "--draw -: expected a file: --json has the standard output"),
        ("--draw a.svg --json ./a.svg", "--json ./a.svg: expected another file than --draw"),
        (
            "--plot a.svg --link-gb-per-s 1 --compute-tflops 1 --draw a.svg",
            "--draw a.svg: expected another file than --plot",
        ),
    ],
)
def test_flags_refused_in_one_line(argv: str, message: str) -> None:
    parser = add_plan_args(ArgumentParser(allow_abbrev=False))
    with pytest.raises(FlagError) as raised:
        check_plan_args(parser.parse_args(argv.split()))
    assert str(raised.value) == f"sla-megatron: error: {message}"


def test_a_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    file = tmp_path / "pattern.svg"
    file.touch()
    parser = add_plan_args(ArgumentParser(allow_abbrev=False))
    with pytest.raises(FlagError, match="expected a new file, or --overwrite beside it"):
        check_plan_args(parser.parse_args(["--draw", str(file)]))
    check_plan_args(parser.parse_args(["--draw", str(file), "--overwrite"]))
