"""How far a job is: documents a second, tokens, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Self

from tqdm import tqdm

from .shards import ShardRecord

# A log file gets a line now and then, a terminal a bar that moves.
_LOG_SECONDS = 10.0


class Progress:
    """A bar over the inputs' work, on stderr.

    Args:
        work: of all inputs, in ``unit``; None if unknown, then there is no time left to tell.
        unit: B or rows.
        finished: shards of an earlier run, which count as done but not in the rates.
    """

    def __init__(self, work: float | None, unit: str, finished: Iterable[ShardRecord]) -> None:
        finished = list(finished)
        self.documents = sum(record.documents for record in finished)
        self.tokens = sum(record.tokens for record in finished)
        self._before, self._begun = self.documents, time.monotonic()
        self._bar = tqdm(
            desc="tokenizing",
            total=work,
            initial=sum(record.work for record in finished),
            unit=unit,
            unit_scale=True,
            mininterval=0.1 if sys.stderr.isatty() else _LOG_SECONDS,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def add(self, record: ShardRecord) -> None:
        """Count a shard that has just been finished."""
        self.documents += record.documents
        self.tokens += record.tokens
        rate = (self.documents - self._before) / max(time.monotonic() - self._begun, 1e-9)
        shown = f"{self.documents:,} documents, {rate:,.0f}/s, {self.tokens:,} tokens"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(record.work)
