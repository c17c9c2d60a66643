"""Enter and leave the CPU backend."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..upstream.megatron_version import require_megatron
from ..upstream.seams import replaced

#: Environment variables, set unless the user has set them.
ENVIRONMENT = {
    # Parts of torch's start-up look at the variable, not at torch._dynamo.config.  And Megatron has functions compiled
    # as it is imported, for which torch imports its compiler, a second and more, where the variable does not say this.
    "TORCHDYNAMO_DISABLE": "1",
    # Megatron insists on it for tensor parallelism on GPUs of some generations; there are no connections to count here.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}

_active = False
_elsewhere = False


def cpu_backend_is_active() -> bool:
    """Whether the caller runs inside :func:`cpu_backend`, and not for :func:`another_machine`."""
    return _active and not _elsewhere


@contextmanager
def another_machine() -> Iterator[None]:
    """Within the block, flags are those of a run elsewhere, on GPUs: that none is here refuses none of them."""
    global _elsewhere
    before, _elsewhere = _elsewhere, True
    try:
        yield
    finally:
        _elsewhere = before


@contextmanager
def cpu_backend() -> Iterator[None]:
    """Within the block, Megatron runs on the CPU; on leaving, every replaced name is upstream's again.

    Entering it twice is entering it once.  Choose gloo and the local spec too: ``flags.fit_to_cpu``.
    """
    global _active
    if _active:
        yield
        return
    require_megatron()
    with ExitStack() as stack:
        stack.enter_context(_environment(ENVIRONMENT))
        # Imported here: it imports Megatron, which takes seconds and is not needed to choose a device.
        from .replacements import SILENCED, replacements
        from .tensors import CudaMeansCpu

        for entered in (_silenced(*SILENCED), replaced(replacements()), CudaMeansCpu()):
            stack.enter_context(entered)
        _active = True
        try:
            yield
        finally:
            _active = False


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def _silenced(logger_name: str, message: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)

    def keep(record: logging.LogRecord) -> bool:
        return record.getMessage() != message

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
