"""What is said while a job goes on: how far it is, and what is waited for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from tqdm import tqdm

from ...common import waiting

if TYPE_CHECKING:
    from .shards import Advance, ShardRecord


def waiting_for(what: str, quick: bool = False) -> AbstractContextManager[None]:
    """:func:`sla_megatron.common.waiting.waiting_for` of ``sla-data``."""
    return waiting.waiting_for("sla-data", what, quick)


class Progress:
    """A bar over the inputs' work.

    Args:
        drawn: the bar.
        finished: shards of an earlier run, which count as done but not in the rates.
    """

    def __init__(self, drawn: tqdm, finished: Iterable[ShardRecord]) -> None:
        finished = list(finished)
        self._bar = drawn
        self.documents = sum(record.documents for record in finished)
        self.tokens = sum(record.tokens for record in finished)
        self._work = sum(record.work for record in finished)
        self._before, self._begun = self.documents, time.monotonic()
        #: Of blocks that are not finished, how far they are, and their part of the work.
        self._underway: dict[int, tuple[Advance, float]] = {}
        self._workers = ""
        self._show()

    def add(self, record: ShardRecord) -> None:
        """Count a shard that has just been finished."""
        self._underway.pop(record.number, None)
        self.documents += record.documents
        self.tokens += record.tokens
        self._work += record.work
        self._show()

    def advance(self, advance: Advance, work: float) -> None:
        """Count what a worker has done of a block, whose part of the inputs' work is ``work``."""
        self._underway[advance.number] = advance, work
        self._show()

    def staff(self, ready: int, started: int, most: int) -> None:
        """Show how many workers there are, and how many still build their tokenizers."""
        starting = f", {started - ready} starting" if ready < started else ""
        self._workers = f", {started} of {most} workers{starting}"
        self._show()

    def _show(self) -> None:
        underway = self._underway.values()
        documents = self.documents + sum(advance.documents for advance, _ in underway)
        tokens = self.tokens + sum(advance.tokens for advance, _ in underway)
        rate = (documents - self._before) / max(time.monotonic() - self._begun, 1e-9)
        self._bar.set_postfix_str(
            f"{documents:,} documents, {rate:,.0f}/s, {tokens:,} tokens{self._workers}", refresh=False
        )
        self._bar.update(self._work + sum(advance.share * work for advance, work in underway) - self._bar.n)
