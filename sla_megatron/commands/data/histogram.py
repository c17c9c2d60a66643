"""How many documents have about which length: as text, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy

from ...common.figures import fault_of_plot, save_figure
from .contents import Lengths
from .errors import DataError

_BAR = 40


@dataclass(frozen=True)
class Bin:
    """Documents of ``least`` to ``greatest`` tokens, both included, and how many tokens they have together."""

    least: int
    greatest: int
    documents: int
    tokens: int

    @property
    def label(self) -> str:
        return f"{self.least:,}" if self.least == self.greatest else f"{self.least:,}-{self.greatest:,}"


def histogram(lengths: Lengths) -> list[Bin]:
    """Bins from the shortest to the longest document: 0, 1, 2-3, 4-7 and so on."""
    if not lengths.documents:
        return []
    # frexp's exponent is the number of bits.
    bits = numpy.frexp(lengths.values.astype(numpy.float64))[1]
    bins = []
    for width in range(int(bits[0]), int(bits[-1]) + 1):
        inside = bits == width
        counts = lengths.counts[inside]
        least, greatest = (0, 0) if width == 0 else (1 << (width - 1), (1 << width) - 1)
        bins.append(Bin(least, greatest, int(counts.sum()), int(lengths.values[inside] @ counts)))
    return bins


def as_text(bins: list[Bin]) -> list[str]:
    """A head line and a line for each bin, its bar in proportion to its documents."""
    if not bins:
        return []
    most, tokens = max(one.documents for one in bins), sum(one.tokens for one in bins)
    rows = [
        (one.label, f"{one.documents:,}", f"{100 * one.tokens / max(tokens, 1):.1f}", _bar(one.documents, most))
        for one in bins
    ]
    rows.insert(0, ("tokens", "documents", "% of tokens", ""))
    left, middle, right = (max(len(row[column]) for row in rows) for column in range(3))
    return [f"{a:>{left}}  {b:>{middle}}  {c:>{right}}  {bar}".rstrip() for a, b, c, bar in rows]


def _bar(documents: int, most: int) -> str:
    # What is there is seen, however little.
    return "#" * -(-_BAR * documents // most)


def check_plot(path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise :class:`DataError` if a picture of ``inputs`` cannot be written to ``path``; before anything is read."""
    expected = fault_of_plot(path, (".png",), overwrite, inputs)
    if expected is not None:
        raise DataError(f"--plot {path}: expected {expected}")


def plot(histograms: dict[str, list[Bin]], path: Path) -> None:
    """Draw a histogram for each name below the other to ``path``, a PNG that is there whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 3 * len(histograms)), layout="constrained")
    axes = figure.subplots(len(histograms), 1, squeeze=False)
    for one, (name, bins) in zip(axes[:, 0], histograms.items(), strict=True):
        one.bar(range(len(bins)), [item.documents for item in bins], width=0.9, color=(0.20, 0.45, 0.80))
        one.set_xticks(range(len(bins)), [item.label for item in bins], rotation=30, ha="right")
        # A dollar sign would start a formula.
        one.set_title(name.replace("$", r"\$"), loc="left")
        one.set_ylabel("documents")
    axes[-1, 0].set_xlabel("tokens a document")
    try:
        save_figure(figure, path, dpi=150)
    except OSError as error:
        raise DataError(f"--plot {path}: cannot be written: {error.strerror or error}") from error
