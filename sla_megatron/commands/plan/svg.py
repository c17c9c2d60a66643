"""A small writer of SVG: boxes, curves and lines of text, the same bytes for the same picture.  Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree

#: Width of a character of a monospaced font over its size; fonts differ a little, and none is wider.
CHARACTER = 0.62


class Svg:
    """A picture that is drawn from back to front.

    Args:
        title: what readers of screens are told.
        style: CSS of the classes that shapes and texts are of.
    """

    def __init__(self, title: str, style: str) -> None:
        self.root = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg")
        self._add(self.root, "title").text = title
        self._add(self.root, "style").text = style

    def boxes(self, kind: str, boxes: list[tuple[float, float, float, float]]) -> None:
        """Boxes (left, top, width, height) of one class."""
        self.path(kind, "".join(f"M{_(x)} {_(y)}h{_(w)}v{_(h)}h{_(-w)}z" for x, y, w, h in boxes))

    def path(self, kind: str, way: str) -> None:
        """A path, unless it is empty."""
        if way:
            self._add(self.root, "path", {"class": kind, "d": way})

    def arrowhead(self, name: str, colour: str) -> None:
        """What ``marker-end:url(#name)`` puts on the end of a path."""
        size = {"markerWidth": "7", "markerHeight": "6", "refX": "6", "refY": "3", "orient": "auto"}
        marker = self._add(self.root, "marker", {"id": name, "markerUnits": "userSpaceOnUse"} | size)
        self._add(marker, "path", {"d": "M0 0L6 3L0 6z", "fill": colour})

    def text(self, kind: str, x: float, y: float, text: str) -> None:
        """One line of text, whose foot is at ``y``."""
        self._add(self.root, "text", {"class": kind, "x": _(x), "y": _(y)}).text = text

    def written(self, width: float, height: float) -> bytes:
        """The picture, of that size."""
        size = {"width": _(width), "height": _(height), "viewBox": f"0 0 {_(width)} {_(height)}"}
        for name, value in size.items():
            self.root.set(name, value)
        ElementTree.indent(self.root, "")
        return ElementTree.tostring(self.root, encoding="utf-8") + b"\n"

    @staticmethod
    def _add(parent: ElementTree.Element, tag: str, attributes: Mapping[str, str] | None = None) -> ElementTree.Element:
        return ElementTree.SubElement(parent, tag, dict(attributes or {}))


def _(number: float) -> str:
    """A length, without digits that nobody sees."""
    return f"{round(number, 1):g}"


def curve(x: float, start: float, end: float, bulge: float) -> str:
    """From ``(x, start)`` to ``(x, end)``, out to one side by three quarters of ``bulge``."""
    return f"M{_(x)} {_(start)}C{_(x + bulge)} {_(start)} {_(x + bulge)} {_(end)} {_(x)} {_(end)}"


def line(x: float, y: float, to_x: float, to_y: float) -> str:
    """A straight one."""
    return f"M{_(x)} {_(y)}L{_(to_x)} {_(to_y)}"
