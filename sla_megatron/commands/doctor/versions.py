"""Versions of what the job runs on; they must be the same on all nodes."""

from __future__ import annotations

import importlib.util
import platform
import sys
from argparse import Namespace

from ...common.environment import installed_version
from .finding import Doubt, Fault, Skipped

OLDEST_PYTHON = (3, 12)
OLDEST_TORCH = (2, 6)


def python_version(found: tuple[int, ...] = sys.version_info[:3]) -> str:
    """Python's, at least :data:`OLDEST_PYTHON`."""
    if found[:2] < OLDEST_PYTHON:
        raise Fault(f"{_dotted(found)}: expected {_dotted(OLDEST_PYTHON)} or newer")
    return f"{_dotted(found)} ({platform.machine()})"


def torch_versions(device: str) -> str:
    """torch's, at least :data:`OLDEST_TORCH`, and those of CUDA and NCCL that it was built with."""
    import torch

    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        raise Fault(f"{torch.__version__}: expected {_dotted(OLDEST_TORCH)} or newer")
    if torch.version.cuda is None:
        if device == "cuda":
            raise Fault(f"{torch.__version__} is built without CUDA: expected a CUDA build, or --device cpu")
        return f"{torch.__version__}, without CUDA"
    if not torch.distributed.is_nccl_available():
        if device == "cuda":
            raise Fault(f"{torch.__version__} is built without NCCL: expected a build with it, or --device cpu")
        return f"{torch.__version__}, CUDA {torch.version.cuda}, without NCCL"
    nccl = torch.cuda.nccl.version()
    return f"{torch.__version__}, CUDA {torch.version.cuda}, NCCL {_dotted(nccl)}"


def transformer_engine(args: Namespace, device: str) -> str:
    """Transformer Engine is there where ``--transformer-impl`` asks for it."""
    installed = installed_version("transformer-engine", "transformer_engine")
    if installed is not None:
        used = "used" if args.transformer_impl == "transformer_engine" and device == "cuda" else "not used"
        return f"{installed}, {used}: --transformer-impl {args.transformer_impl}"
    if device == "cpu":
        # Here, which may be a login node.
        asked = args.transformer_impl == "transformer_engine"
        on_gpus = "; a job on GPUs takes transformer-engine, or --transformer-impl local" if asked else ""
        raise Skipped(f"not installed; without a GPU the local implementation is used{on_gpus}")
    if args.transformer_impl == "transformer_engine":
        raise Fault("not installed: expected transformer-engine, or --transformer-impl local")
    return f"not installed, not needed: --transformer-impl {args.transformer_impl}"


def apex(args: Namespace, device: str) -> str:
    """Whether Apex is there: where it is not, the entry point switches its kernels off, Megatron replaces the rest."""
    installed = installed_version("apex", "apex")
    if installed is not None:
        return installed
    if device == "cpu":
        raise Skipped("not installed; torch's norms and optimizers are used")
    if installed_version("transformer-engine", "transformer_engine") is not None:
        return "not installed; Transformer Engine's optimizers are used"
    return "not installed; torch's norms and optimizers are used"


def flags_without_kernels() -> list[str]:
    """What a run needs here that Megatron's defaults are not: fused kernels of theirs are not installed.

    The entry point gives all but the first itself (``flags/fused_kernels.py``), as far as its other flags need them.
    """
    has_te = importlib.util.find_spec("transformer_engine") is not None
    needed = [] if has_te else ["--transformer-impl local"]
    # Extensions of Apex, which its own package need not have been built with.
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        needed.append("--no-gradient-accumulation-fusion")
    if not has_te:
        # Apex has persistent LayerNorms, and no RMSNorm.
        needed.append("--no-persist-layer-norm")
        needed += [] if importlib.util.find_spec("scaled_masked_softmax_cuda") else ["--no-masked-softmax-fusion"]
        needed.append("--no-rope-fusion")
    return needed


def kernels(device: str) -> str:
    """Transformer Engine and Apex, where no job's flags are known.

    Raises:
        Doubt: if Transformer Engine, Megatron's default implementation, is not there.
        Skipped: on a processor, where neither is used.
    """
    te = installed_version("transformer-engine", "transformer_engine")
    apex = installed_version("apex", "apex")
    if device == "cpu":
        raise Skipped("without a GPU neither Transformer Engine nor Apex is used")
    names = (("Transformer Engine", te), ("Apex", apex))
    has = ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in names)
    needed = flags_without_kernels()
    own_script = f"; a script of one's own is given {' '.join(needed)}" if needed else ""
    if te is None:
        raise Doubt(f"{has}: a run is given {needed[0]}{own_script}")
    return f"{has}{own_script}"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
