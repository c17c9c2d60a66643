"""Who reads whom: a picture, or a table of text.  Pure Python.

A row is a layer and a column a K/V group; the left half of a cell is its keys, the right half its values.  Layers are
counted as ``--sla-layers`` counts them.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import groupby

from ...attention.sla_config import KINDS, Kind, SLAConfig
from ...common.tables import table
from .job import Job
from .svg import CHARACTER, Svg, curve, line

_ROW, _BOX, _COLUMN_GAP, _MARGIN = 24, 18, 8, 14
_FONT = 12
#: Arcs of neighbouring layers stand out by this much, of others by as much more for each layer between, up to a most.
_ARC, _WIDEST_ARC = 8, 120

#: With more arcs than this on a side they are thin.
_FEW_ARCS = 24

_LEGEND = (
    "a layer reads its own keys (K), its own values (V)",
    "those of the layer that the number names",
    "later layers read what this one projects (arcs: keys on the left, values on the right)",
    "nobody reads what this layer projects: dead",
)

_COLOURS = {"key": ("#2471a3", "#d4e6f1", "#123a52"), "value": ("#ca6f1e", "#fae5d3", "#6e3a0c")}

_OF_KIND = (
    ".{kind}{{fill:{solid}}}.{kind}-of{{fill:{pale}}}.{kind}-for{{fill:{dark}}}"
    ".{kind}-way{{fill:none;stroke:{solid};stroke-width:1.5;marker-end:url(#to-{kind})}}"
)

_STYLE = (
    "text{font-family:monospace;font-size:12px;fill:#222}.c{text-anchor:middle}.n{font-size:10px;text-anchor:middle}"
    ".p{fill:#fff}.z{fill:#f4f4f4}.x{stroke:#c0392b;stroke-width:1.3}.b{stroke:#888;stroke-dasharray:5 4}"
    + "".join(
        _OF_KIND.format(kind=kind, solid=solid, pale=pale, dark=dark) for kind, (solid, pale, dark) in _COLOURS.items()
    )
    + ".thin{stroke-width:.5}"
)


def picture(job: Job) -> bytes:
    """An SVG of ``job``'s pattern, and of its pipeline's stages if there are several."""
    return _Picture(job).drawn()


def text(job: Job) -> str:
    """The same as a table: the layer whose tensors a group reads, for what is shared."""
    sla, kind = job.sla, job.sla.shared_kinds[0]

    def cell(layer: int, group: int) -> str:
        source = sla.source_of(layer, group, kind)
        return ("." if source == layer else str(source)) + "x" * (not sla.is_live(layer, group, kind))

    rows = [
        (str(layer), *(cell(layer, group) for group in range(sla.num_query_groups)), *_stage_label(job, layer)[:1])
        for layer in range(1, sla.num_layers + 1)
    ]
    header = ("layer", *map(str, range(sla.num_query_groups)), *["stage"] * (job.layout.num_stages > 1))
    what = {"kv": "keys and values", "values": "values", "keys": "keys"}[sla.share]
    title = (
        f"SLA: {job.description}\n"
        f"Each layer's {what}, group by group: . its own, else the layer they are read from; x: its own have no reader"
    )
    return f"{title}\n" + table(header, rows)


def _stage_label(job: Job, layer: int) -> tuple[str, ...]:
    """The virtual stage of an attention layer and its rank; nothing where there is one stage."""
    if job.layout.num_stages == 1:
        return ()
    stage = job.layout.stage_of[job.work.numbers.in_stack(layer)]
    return f"{stage} (rank {job.layout.rank(stage)})", f"stage {stage}, rank {job.layout.rank(stage)}"


@dataclass(frozen=True)
class _Places:
    """Where things are, in pixels.

    Attributes:
        half: width of half of a cell.
        grid: left edge of the first column.
        top: upper edge of the first row.
    """

    half: float
    grid: float
    top: float

    def row(self, layer: int) -> float:
        """The upper edge of a layer's row."""
        return self.top + (layer - 1) * _ROW

    def box(self, layer: int, group: int, kind: Kind) -> tuple[float, float, float, float]:
        """Left, top, width and height of half of a cell."""
        left = self.grid + group * (2 * self.half + _COLUMN_GAP) + (self.half if kind == "value" else 0)
        return left, self.row(layer) + (_ROW - _BOX) / 2, self.half, _BOX


class _Picture:
    def __init__(self, job: Job) -> None:
        self.job, self.sla = job, job.sla
        sla = self.sla
        self.readers: dict[Kind, list[tuple[int, int]]] = {kind: _arcs(sla, kind) for kind in KINDS}
        distances = [reader - source for arcs in self.readers.values() for source, reader in arcs]
        self.arc_step = min(_ARC, _WIDEST_ARC / max(distances, default=1))
        # A curve stands out by three quarters of its bulge; beside it there is room for its arrowhead.
        reach = {
            kind: 10 + self._bulge(max((reader - source for source, reader in arcs), default=0)) * 0.75
            for kind, arcs in self.readers.items()
        }
        self.labels = [self._row_label(layer) for layer in range(1, sla.num_layers + 1)]
        self.stages = [_stage_label(job, layer)[1:] for layer in range(1, sla.num_layers + 1)]
        labelled = max(map(len, self.labels)) * _FONT * CHARACTER
        staged = max((len(name) for names in self.stages for name in names), default=0) * _FONT * CHARACTER
        half = 10 + 7 * len(str(sla.num_layers))
        grid = _MARGIN + labelled + reach["key"]
        self.right = grid + sla.num_query_groups * (2 * half + _COLUMN_GAP) - _COLUMN_GAP
        self.stage_column = self.right + reach["value"] + 6
        legend = _MARGIN + 2 * half + 10 + max(map(len, _LEGEND)) * _FONT * CHARACTER
        self.width = max(legend, self.stage_column + staged) + _MARGIN
        self.title = textwrap.wrap(f"SLA: {job.description}", int((self.width - 2 * _MARGIN) / (_FONT * CHARACTER)))
        self.at = _Places(half, grid, _MARGIN + 16 * len(self.title) + 40)
        self.bottom = self.at.row(sla.num_layers + 1)

    def _row_label(self, layer: int) -> str:
        stack = self.job.work.numbers.in_stack(layer)
        return f"layer {layer}" + (f" ({stack} of {self.job.layout.num_layers})" if self.job.pattern else "")

    def _bulge(self, distance: int) -> float:
        return 16 + self.arc_step * distance if distance else 0

    def drawn(self) -> bytes:
        svg = Svg("Who reads whose keys and values", _STYLE)
        for kind in KINDS:
            svg.arrowhead(f"to-{kind}", _COLOURS[kind][0])
        height = self.bottom + 5 * 22 + _MARGIN
        svg.boxes("p", [(0, 0, self.width, height)])
        bands = [self.at.row(layer) for layer in range(1, self.sla.num_layers + 1, 2)]
        svg.boxes("z", [(_MARGIN / 2, top, self.width - _MARGIN, _ROW) for top in bands])
        for number, words in enumerate(self.title):
            svg.text("t", _MARGIN, _MARGIN + 12 + 16 * number, words)
        self._axes(svg)
        for kind in KINDS:
            self._cells(svg, kind)
            self._ways(svg, kind)
        self._dead(svg)
        self._stages(svg)
        self._legend(svg)
        return svg.written(self.width, height)

    def _axes(self, svg: Svg) -> None:
        for layer, label in enumerate(self.labels, start=1):
            svg.text("t", _MARGIN, self.at.row(layer) + 16, label)
        svg.text("t", _MARGIN, self.at.top - 20, "group")
        for group in range(self.sla.num_query_groups):
            left = self.at.box(1, group, "key")[0]
            svg.text("c", left + self.at.half, self.at.top - 20, str(group))
            svg.text("n", left + self.at.half / 2, self.at.top - 5, "K")
            svg.text("n", left + self.at.half * 1.5, self.at.top - 5, "V")

    def _cells(self, svg: Svg, kind: Kind) -> None:
        """Half cells: own, of another layer, and whether later layers read what the layer projects."""
        own, others, read_later = [], [], []
        for layer in range(1, self.sla.num_layers + 1):
            for group in range(self.sla.num_query_groups):
                box = self.at.box(layer, group, kind)
                source = self.sla.source_of(layer, group, kind)
                (own if source == layer else others).append((box, source))
                if self.sla.readers(layer, group, kind):
                    left, top, width, height = box
                    read_later.append((left, top + height - 4, width, 4))
        svg.boxes(kind, [box for box, _ in own])
        svg.boxes(f"{kind}-of", [box for box, _ in others])
        svg.boxes(f"{kind}-for", read_later)
        for (left, top, width, _), source in others:
            svg.text("n", left + width / 2 - 2, top + 11, str(source))

    def _ways(self, svg: Svg, kind: Kind) -> None:
        """An arc for each pair of layers: of keys on the left, of values on the right."""
        x, side = (self.at.grid - 2, -1) if kind == "key" else (self.right + 2, 1)
        thin = " thin" * (len(self.readers[kind]) > _FEW_ARCS)
        for source, reader in self.readers[kind]:
            # What leaves a layer and what reaches it part.
            start, end = self.at.row(source) + _ROW / 2 + 3, self.at.row(reader) + _ROW / 2 - 3
            svg.path(f"{kind}-way{thin}", curve(x, start, end, side * self._bulge(reader - source)))

    def _dead(self, svg: Svg) -> None:
        crosses = [
            _cross(*self.at.box(layer, group, kind)[:3])
            for layer in range(1, self.sla.num_layers + 1)
            for group in range(self.sla.num_query_groups)
            for kind in KINDS
            if not self.sla.is_live(layer, group, kind)
        ]
        svg.path("x", "".join(crosses))

    def _stages(self, svg: Svg) -> None:
        layer = 1
        for label, same in groupby(self.stages):
            first, layer = layer, layer + len(list(same))
            if first > 1:
                y = self.at.row(first)
                svg.path("b", line(_MARGIN / 2, y, self.width - _MARGIN / 2, y))
            for words in label:
                svg.text("t", self.stage_column, (self.at.row(first) + self.at.row(layer)) / 2 + 4, words)

    def _legend(self, svg: Svg) -> None:
        kind = self.sla.shared_kinds[0]
        left, half = _MARGIN, self.at.half
        for number, words in enumerate(_LEGEND):
            top = self.bottom + 22 * (number + 1) - 8
            box = (left, top, half, _BOX)
            svg.boxes("key" if number == 0 else kind if number == 2 else f"{kind}-of", [box])
            if number == 0:
                svg.boxes("value", [(left + half, top, half, _BOX)])
            elif number == 2:
                svg.boxes(f"{kind}-for", [(left, top + _BOX - 4, half, 4)])
            else:
                svg.text("n", left + half / 2 - 2, top + 11, "n")
            if number == 3:
                svg.path("x", _cross(*box[:3]))
            svg.text("t", left + 2 * half + 10, top + 13, words)


def _arcs(sla: SLAConfig, kind: Kind) -> list[tuple[int, int]]:
    """(source, reader) for each pair of layers, of any group."""
    found = {
        (layer, reader)
        for layer in range(1, sla.num_layers + 1)
        for group in range(sla.num_query_groups)
        for reader in sla.readers(layer, group, kind)
    }
    return sorted(found)


def _cross(left: float, top: float, width: float) -> str:
    """In the upper right corner."""
    right = left + width - 1.5
    return line(right - 4, top + 1.5, right, top + 5.5) + line(right - 4, top + 5.5, right, top + 1.5)
