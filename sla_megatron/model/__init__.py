"""A skip-layer model built by Megatron's own builder: layer specs, transformer block, hybrid stack, recomputation,
schedule plans, report.

Imports ``flags``, ``pipeline``, ``attention``, ``cpu``, ``upstream`` and ``common``.
"""
