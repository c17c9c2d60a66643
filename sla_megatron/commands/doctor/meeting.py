"""How the ranks hear of each other: through torch's store, not through collectives.

A collective that a rank does not come to hangs, or fails without saying who was missing.  In a store each rank leaves
what it found under its own number, so that rank 0 can tell who has not come, and the others need no process group.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from ...attention.sla_config import compact_ranges
from .place import Place

#: Seconds after which rank 0 says whom it is waiting for, and between the times it says so.
PATIENCE = 10.0
#: Seconds between two looks into the store: a wait that fails prints a warning of torch's.
_PAUSE = 0.05
#: Seconds that rank 0 gives its own server to start, at least.
_OWN_SERVER = 30.0


class Meeting:
    """What ranks tell each other, under names.

    ``store`` is shared by all ranks; each rank, and each thread that waits, has a connection of its own to it.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size

    def leave(self, what: str, text: str) -> None:
        """Leave ``text`` as this rank's ``what``."""
        self.store.set(f"{what}/{self.rank}", text)

    def publish(self, name: str, value: Any) -> None:
        """Have every rank's :meth:`await_` of ``name`` return ``value``, which JSON can hold."""
        self.store.set(name, json.dumps(value))

    def await_(self, name: str, seconds: float) -> Any:
        """What rank 0 published as ``name``; raises ``TimeoutError`` where it has not in ``seconds``."""
        if not self._is_there(name, seconds):
            raise TimeoutError(f"rank 0 did not say {name!r} within {seconds:.0f} s")
        return json.loads(self.store.get(name))

    def gather(
        self,
        what: str,
        ranks: Iterable[int],
        seconds: float,
        say: Callable[[str], None] = lambda line: None,
        enough: Callable[[dict[int, str]], bool] = lambda answers: False,
    ) -> dict[int, str]:
        """What ``ranks`` left as ``what``, by rank: all of it, or what is there after ``seconds`` or when ``enough``.

        ``say`` hears every :data:`PATIENCE` seconds who is missing.
        """
        missing, answers = list(ranks), {}
        start = said = time.monotonic()
        while missing:
            come = [rank for rank in missing if self.store.check([f"{what}/{rank}"])]
            answers |= {rank: self.store.get(f"{what}/{rank}").decode() for rank in come}
            missing = [rank for rank in missing if rank not in answers]
            now = time.monotonic()
            if not missing or now - start > seconds or enough(answers):
                break
            if now - said > PATIENCE:
                said = now
                say(f"waiting for {ranks_text(missing)}: {now - start:.0f} of {seconds:.0f} s")
            time.sleep(_PAUSE)
        return answers

    def _is_there(self, key: str, seconds: float) -> bool:
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError:
            return False
        return True


def connect(place: Place, seconds: float) -> Store:
    """A connection to the job's store; of a process alone, a store of its own.

    Under torchrun the store is its agent's; else rank 0 serves it at ``MASTER_ADDR:MASTER_PORT``.

    Raises:
        RuntimeError: if nothing answers there within ``seconds``, or rank 0 cannot listen.
    """
    if not place.launched:
        return HashStore()
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serves,
        timeout=timedelta(seconds=max(seconds, _OWN_SERVER) if serves else seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    # An agent's store is used by the ranks of each restart.
    return PrefixStore(f"sla-doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def ranks_text(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 3, 5-7``."""
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {compact_ranges(numbers).replace(',', ', ')}"
