"""Tests of vLLM, in the environment that ``make test-serving`` makes: vLLM wants older versions than training.

vLLM reads its settings from the environment when it is imported, and so before the tests are.
"""

from __future__ import annotations

import importlib.util
import os

SETTINGS = {
    # In this process, whose engine is then looked into; no more memory than tiny models need, in GB.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

if importlib.util.find_spec("vllm") is None:
    # The environment of `make test` has none.
    collect_ignore_glob = ["*"]
else:
    os.environ.update(SETTINGS)
