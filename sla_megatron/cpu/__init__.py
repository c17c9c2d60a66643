"""Running unmodified Megatron on a machine without a GPU, on gloo, and ``--device``, which decides whether to.

``device.py`` decides; ``backend.py`` enters and leaves; ``replacements.py`` is the complete list of what is replaced
meanwhile; ``cuda_api.py``, ``tensors.py`` and ``optimizer.py`` hold the stand-ins, ``norm.py`` the one layer that the
local spec lacks; ``flags.py`` switches off the Megatron flags that need CUDA.  Imports ``upstream`` and ``common``.
"""
