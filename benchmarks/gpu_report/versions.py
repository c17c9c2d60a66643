"""What the machine is and has, as JSON on the last line: asked of a process of its own, which ends, and holds no GPU.

python -m benchmarks.gpu_report.versions cuda
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from sla_megatron.common.environment import commit, installed_version, machine

#: Import name -> distribution, of what may be there or not, and matters.
_OPTIONAL = {"apex": "apex", "triton": "triton", "flash_attn": "flash-attn", "fused_weight_gradient_mlp_cuda": "apex"}


def versions(device: str) -> dict[str, Any]:
    """Processor, GPUs, driver and packages; what is not there is ``None``."""
    import torch

    gpus = range(torch.cuda.device_count() if device == "cuda" else 0)
    names = [torch.cuda.get_device_name(gpu) for gpu in gpus]
    found = machine(names[0] if names else "cpu")
    found.setdefault("transformer-engine", None)
    return found | {
        "commit": commit(),
        "gpus": names,
        "gpu_memory": [torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus],
        "driver": _driver() if names else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if names else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if names else None,
        **{module: installed_version(distribution, module) for module, distribution in _OPTIONAL.items()},
    }


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


if __name__ == "__main__":
    print(json.dumps(versions(sys.argv[1])))
