"""Megatron's checkpoint writer and the signal that ends a job."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator

import pytest

from tests.support.processes import alive

#: A process like ``python -m sla_megatron.pretrain_gpt``, that starts a helper as Megatron does and says which it is.
RANK = """
import multiprocessing, sys, time
import sla_megatron.pretrain_gpt
sys.modules["__main__"].__spec__ = sla_megatron.pretrain_gpt.__spec__
manager = multiprocessing.get_context("spawn").Manager()
print(manager._process.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def writer(megatron: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Upstream's module, without a queue yet."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    yield filesystem_async


def flags(**changes: object) -> Namespace:
    settings = {"save": "checkpoints", "exit_signal_handler": True, "exit_signal": signal.SIGTERM}
    return Namespace(**settings | {"ckpt_format": "torch_dist", "async_save": True} | changes)


def test_a_save_that_is_waited_for_has_no_helper(writer) -> None:
    """What it would be for, handing results from one process to another, happens in one."""
    from sla_megatron.training.checkpoint_writer import shield_checkpoint_writer

    before = multiprocessing.active_children()
    shield_checkpoint_writer(flags(async_save=False, exit_signal_handler=False))
    first = writer.get_write_results_queue()
    first.put("of a save that was not finished")
    assert multiprocessing.active_children() == before
    # In a second attempt of the same process nothing of the first is found.
    shield_checkpoint_writer(flags(async_save=False))
    with pytest.raises(queue.Empty):
        writer.get_write_results_queue().get_nowait()


def test_the_queue_outlives_the_signal(writer) -> None:
    """As when Slurm signals every process of a step: the queue that the save goes through still works."""
    from sla_megatron.training.checkpoint_writer import shield_checkpoint_writer

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    shield_checkpoint_writer(flags())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    results = writer.get_write_results_queue()
    helper = results._manager._process
    os.kill(helper.pid, signal.SIGTERM)
    time.sleep(0.5)
    results.put("written")
    assert helper.is_alive() and results.get() == "written"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_the_helper_ends_with_a_rank_that_is_killed() -> None:
    """A rank that gets no word, as where memory runs out, leaves no process behind that hears no signal either."""
    rank = subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    helper = int(rank.stdout.readline())
    assert alive(helper)
    rank.kill()
    rank.wait()
    deadline = time.monotonic() + 20
    while alive(helper):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_it_the_queue_dies(writer) -> None:
    """What upstream does by itself: once this fails, this project's part can go."""
    results = writer.get_write_results_queue()
    helper = results._manager._process
    os.kill(helper.pid, signal.SIGTERM)
    helper.join(10)
    assert helper.exitcode == -signal.SIGTERM
    with pytest.raises((EOFError, OSError)):
        results.put("written")


@pytest.mark.parametrize("changes", [{"save": None}, {"exit_signal_handler": False}, {"ckpt_format": "torch"}])
def test_nothing_is_started_where_nothing_is_saved_after_a_signal(writer, changes: dict[str, object]) -> None:
    from sla_megatron.training.checkpoint_writer import shield_checkpoint_writer

    shield_checkpoint_writer(flags(**changes))
    assert writer._results_queue is None
