"""The method: who reads whose K/V (``sla_config``), what a layer hands on and takes (``roles``, ``pieces``), where K/V
live meanwhile (``microbatch_kv``), and the two attentions that take upstream's place.

Imports ``upstream`` and ``common``.  The first three are pure Python.
"""
