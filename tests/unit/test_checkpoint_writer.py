"""Megatron's checkpoint writer and the signal that ends a job."""

from __future__ import annotations

import os
import signal
import time
from argparse import Namespace
from collections.abc import Iterator

import pytest


@pytest.fixture
def writer(megatron: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Upstream's module, without a queue yet."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    yield filesystem_async


def flags(**changes: object) -> Namespace:
    settings = {"save": "checkpoints", "exit_signal_handler": True, "exit_signal": signal.SIGTERM}
    return Namespace(**settings | {"ckpt_format": "torch_dist"} | changes)


def test_the_queue_outlives_the_signal(writer) -> None:
    """As when Slurm signals every process of a step: the queue that the save goes through still works."""
    from sla_megatron.checkpoint_writer import shield_checkpoint_writer

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    shield_checkpoint_writer(flags())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    queue = writer.get_write_results_queue()
    helper = queue._manager._process
    os.kill(helper.pid, signal.SIGTERM)
    time.sleep(0.5)
    queue.put("written")
    assert helper.is_alive() and queue.get() == "written"


def test_without_it_the_queue_dies(writer) -> None:
    """What upstream does by itself: once this fails, this project's part can go."""
    queue = writer.get_write_results_queue()
    helper = queue._manager._process
    os.kill(helper.pid, signal.SIGTERM)
    helper.join(10)
    assert helper.exitcode == -signal.SIGTERM
    with pytest.raises((EOFError, OSError)):
        queue.put("written")


@pytest.mark.parametrize("changes", [{"save": None}, {"exit_signal_handler": False}, {"ckpt_format": "torch"}])
def test_nothing_is_started_where_nothing_is_saved_after_a_signal(writer, changes: dict[str, object]) -> None:
    from sla_megatron.checkpoint_writer import shield_checkpoint_writer

    shield_checkpoint_writer(flags(**changes))
    assert writer._results_queue is None
