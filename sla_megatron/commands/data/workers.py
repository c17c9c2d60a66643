"""Processes that turn blocks into results, as many at a time as asked, and end with the process that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ...common.tokenizers import TokenizerError
from .blocks import Block
from .errors import DataError
from .shards import FatalFault

Work = Callable[[Block], Any]

#: Raised in a worker and again, as they are, in the process that waits for it.
_EXPECTED = (DataError, TokenizerError, FatalFault, OSError)


def work_through(blocks: Iterator[Block], workers: int, prepare: Callable[..., Work], *args: Any) -> Iterator[Any]:
    """``prepare(*args)(block)`` for each block, in the order in which they are finished.

    One worker is this process.  An exception of a worker ends the others after the block they are at: of several
    exceptions that of the earliest block is raised.

    Raises:
        DataError: if a worker was killed.
    """
    if workers == 1:
        yield from map(prepare(*args), blocks)
        return
    begin_preloading()
    context = multiprocessing.get_context("forkserver")
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(_Worker(context, prepare, args)) for _ in range(workers)]
        busy: dict[Connection, _Worker] = {}
        failures: list[tuple[int, BaseException]] = []
        blocks = iter(blocks)
        block = next(blocks, None)
        while busy or (block is not None and not failures):
            while idle and block is not None and not failures:
                worker = idle.pop()
                worker.start(block)
                busy[worker.connection] = worker
                block = next(blocks, None)
            for connection in wait(list(busy)):
                worker = busy.pop(connection)
                idle.append(worker)
                result = worker.result()
                if isinstance(result, BaseException):
                    failures.append((worker.number, result))
                else:
                    yield result
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]


def begin_preloading() -> None:
    """Start the process that workers are forks of, which imports Megatron once for all of them, unless it runs.

    It holds no ends of workers' pipes: a worker sees at once that the process it works for is gone.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    multiprocessing.get_context("forkserver").set_forkserver_preload([__package__ + ".worker_imports"])
    forkserver.ensure_running()


class _Worker:
    """One process, and the block that it is at."""

    def __init__(self, context: Any, prepare: Callable[..., Work], args: tuple) -> None:
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, prepare, args), daemon=True)
        self.process.start()
        theirs.close()
        self.number = -1

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()
        if exception[0] is not None:
            self.process.terminate()
        self.process.join()

    def start(self, block: Block) -> None:
        self.number = block.number
        with contextlib.suppress(BrokenPipeError):  # Its end is seen where its result is awaited.
            self.connection.send(block)

    def result(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            ending = signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
            return DataError(
                f"a worker was ended ({ending}) at shard {self.number}: if memory ran out, "
                "expected fewer --workers or a smaller --shard-mb; the same command goes on"
            )


def _serve(connection: Connection, prepare: Callable[..., Work], args: tuple) -> None:
    """A worker's life: until the other end is closed, which the death of its process does too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is for the process that hands out work.
    try:
        work = prepare(*args)
    except _EXPECTED as error:
        problem = error

        def work(block: Block) -> Any:
            raise problem

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            block = connection.recv()
            try:
                result = work(block)
            except _EXPECTED as error:
                result = error
            connection.send(result)
