"""Run unmodified Megatron on a machine without a GPU, on gloo.

``backend.py`` enters and leaves; ``replacements.py`` is the complete list of what is replaced meanwhile;
``cuda_api.py``, ``tensors.py`` and ``optimizer.py`` hold the stand-ins, ``norm.py`` the one layer that the local spec
lacks; ``flags.py`` switches off the Megatron flags that need CUDA.
"""

from .backend import choose_device, cpu_backend, cpu_backend_is_active

__all__ = ["choose_device", "cpu_backend", "cpu_backend_is_active"]
