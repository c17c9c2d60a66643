"""What megatron-core's wheel lacks, on any device.

``megatron.training`` compiles the dataset helpers with ``make`` at start and exits the process when that fails.  The
wheel ships them compiled, without the Makefile, so the step always fails there.  In a source checkout, which has the
Makefile, upstream's step is left alone.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .seams import Seam

COMPILE_HELPERS = Seam(
    "megatron.core.datasets.utils:compile_helpers",
    "the wheel ships helpers_cpp compiled and has no Makefile: make fails and Megatron exits",
    (),
    stand_in=lambda: None,
)


def missing_makefile_seams() -> list[Seam]:
    """The one replacement, where it is needed: skip the compilation if helpers are there and the Makefile is not."""
    datasets = importlib.util.find_spec("megatron.core.datasets")
    folder = Path(datasets.submodule_search_locations[0])
    if (folder / "Makefile").exists() or importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return []
    return [COMPILE_HELPERS]
