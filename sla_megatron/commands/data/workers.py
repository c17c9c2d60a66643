"""Processes that turn blocks into results, as many as there is work for; they end with the process that began them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from ...common.launchers import starting_deaf
from ...common.tokenizers import TokenizerError
from .blocks import Block
from .errors import DataError
from .shards import Advance, FatalFault

#: Raised in a worker and again, as they are, in the process that waits for it.
_EXPECTED = (DataError, TokenizerError, FatalFault, OSError)


class Work(Protocol):
    """What a worker does with blocks; ``vocab_size`` is what whoever hands them out wants to know first."""

    vocab_size: int

    def write(self, block: Block, advanced: Callable[[Advance], None]) -> Any:
        """The result of ``block``; how far it is meanwhile is for ``advanced``."""


class Listener(Protocol):
    """Hears how the work is going on."""

    def advance(self, advance: Advance, work: float) -> None:
        """A block, whose part of all work is ``work``, is so far."""

    def staff(self, ready: int, started: int, most: int) -> None:
        """So many workers have built what they need, of those started, of those allowed."""


class ThisProcess:
    """One worker, without a process of its own."""

    def __init__(self, prepare: Callable[..., Work], args: Sequence[Any]) -> None:
        self._prepare, self._args = prepare, args

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def vocab_size(self) -> int:
        self._work = self._prepare(*self._args)
        return self._work.vocab_size

    def results(self, blocks: Iterator[Block], listener: Listener) -> Iterator[Any]:
        for block in blocks:
            yield self._work.write(block, lambda advance, work=block.work: listener.advance(advance, work))


class Team:
    """At most ``most`` processes, each of which calls ``prepare(*args)`` once and then works at one block at a time.

    The first is started to say what it is asked, each further one when a block is there and no other is idle.
    """

    def __init__(self, most: int, prepare: Callable[..., Work], args: Sequence[Any], imports: Sequence[str]) -> None:
        self._most, self._prepare, self._args = most, prepare, args
        begin_preloading(imports)
        self._context = multiprocessing.get_context("forkserver")
        self._workers: list[_Worker] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def vocab_size(self) -> int:
        """Starts the first worker, and waits until it is ready."""
        worker = self._start()
        worker.send(None)
        message = worker.receive()
        if isinstance(message, BaseException):
            raise message
        return message.vocab_size

    def results(self, blocks: Iterator[Block], listener: Listener) -> Iterator[Any]:
        """The result of each block, in the order in which they are finished.

        An exception of a worker ends the others after the block they are at: of several exceptions that of the earliest
        block is raised.

        Raises:
            DataError: if a worker was killed.
        """
        idle, busy = list(self._workers), {}
        failures: list[tuple[int, BaseException]] = []
        block = next(blocks, None)
        while busy or (block is not None and not failures):
            self._tell(listener)
            while block is not None and not failures and (idle or len(self._workers) < self._most):
                worker = idle.pop() if idle else self._start()
                self._tell(listener)
                worker.send(block)
                busy[worker.connection] = worker
                block = next(blocks, None)
            for connection in wait(list(busy)):
                worker = busy[connection]
                message = worker.receive()
                if isinstance(message, _Ready):
                    continue
                if isinstance(message, Advance):
                    listener.advance(message, worker.block.work)
                    continue
                idle.append(busy.pop(connection))
                if isinstance(message, BaseException):
                    failures.append((worker.block.number, message))
                else:
                    yield message
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]

    def _start(self) -> _Worker:
        self._workers.append(self._stack.enter_context(_Worker(self._context, self._prepare, self._args)))
        return self._workers[-1]

    def _tell(self, listener: Listener) -> None:
        listener.staff(sum(worker.ready for worker in self._workers), len(self._workers), self._most)


def begin_preloading(imports: Sequence[str] = ()) -> None:
    """Start the process that workers are forks of, which imports once for all of them, unless it runs.

    It holds no ends of workers' pipes: a worker sees at once that the process it works for is gone.

    Args:
        imports: modules, besides those of the job.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    multiprocessing.get_context("forkserver").set_forkserver_preload([__package__ + ".tokenizing", *imports])
    # Control-C is for this process: the server, while it imports, would say where it was.
    with starting_deaf(signal.SIGINT):
        forkserver.ensure_running()


@dataclass(frozen=True, slots=True)
class _Ready:
    """A worker's first message."""

    vocab_size: int


class _Worker:
    """One process, and the block that it is at."""

    def __init__(self, context: Any, prepare: Callable[..., Work], args: Sequence[Any]) -> None:
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, prepare, args), daemon=True)
        self.process.start()
        theirs.close()
        self.block: Block | None = None
        self.ready = False

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()
        if exception[0] is not None:
            self.process.terminate()
        self.process.join()

    def send(self, block: Block | None) -> None:
        self.block = block
        with contextlib.suppress(BrokenPipeError):  # Its end is seen where its result is awaited.
            self.connection.send(block)

    def receive(self) -> Any:
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            ending = signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
            where = "before its first shard" if self.block is None else f"at shard {self.block.number}"
            return DataError(
                f"a worker was ended ({ending}) {where}: if memory ran out, "
                "expected fewer --workers or a smaller --shard-mb; the same command goes on"
            )
        self.ready |= isinstance(message, _Ready)
        return message


def _serve(connection: Connection, prepare: Callable[..., Work], args: Sequence[Any]) -> None:
    """A worker's life: until the other end is closed, which the death of its process does too.

    Its first block is taken in before it prepares: who hands out blocks need not wait for that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is for the process that hands out work.
    work = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            block = connection.recv()
            try:
                if work is None:
                    work = prepare(*args)
                    connection.send(_Ready(work.vocab_size))
                result = None if block is None else work.write(block, connection.send)
            except (BrokenPipeError, ConnectionResetError):
                return
            except _EXPECTED as error:
                result = error
            if block is not None or result is not None:
                connection.send(result)
