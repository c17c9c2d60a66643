"""The method: who reads whose K/V (``sla_config``), what a layer hands on and takes (``roles``, ``mixing_plan``), what
that is as tensors that cross layers (``declared``, with the two numbers of a layer, ``numbering``), the one operation
that does it (``mixing``), and the two attentions that take upstream's place.

Imports ``pipeline``, ``upstream`` and ``common``.  All but ``mixing`` and the attentions are pure Python.
"""
