"""On each rank: what a process finds at its start, for the comparison of a forked one with one of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    (folder / f"answer{os.environ['RANK']}.json").write_text(json.dumps(state()))
    print("in the log")
    if request == "raise":
        raise RuntimeError("as it was told")
    if request == "sleep":
        time.sleep(1000)
    # Python waits for it.
    threading.Thread(target=lambda: (time.sleep(0.2), print("to the end"))).start()
    sys.exit(request)


def state() -> dict[str, Any]:
    random_by_itself = random.random()
    import numpy
    import torch

    before = set(os.environ)
    from sla_megatron.cpu.device import megatron_device

    with megatron_device(["--device", "cpu"]):
        from megatron.core import parallel_state
        from megatron.training import global_vars

        inside = torch.cuda.is_available()
    return {
        "argv": sys.argv,
        "path": sys.path,
        "main": sys.modules["__main__"].__spec__.name,
        "first in a session": os.getsid(0) == os.getpid(),
        "helper": multiprocessing.parent_process() is not None,
        "folder": os.getcwd(),
        "stdin": sys.stdin.read(),
        "threads": threading.active_count(),
        "environment": {name: os.environ[name] for name in before if name.startswith(("SLA", "RANK", "OMP", "PYTHON"))},
        "torch": [torch.get_num_threads(), str(torch.get_default_dtype())],
        "cuda": [torch.cuda.is_available(), inside, torch._C._len_torch_function_stack()],
        "megatron": [parallel_state.is_initialized(), global_vars._GLOBAL_ARGS is None],
        "own": [random_by_itself, numpy.random.rand(), torch.rand(()).item()],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
