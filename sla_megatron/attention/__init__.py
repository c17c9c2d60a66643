"""The method: who reads whose K/V (``sla_config``), what a layer hands on and takes (``roles``, ``mixing_plan``), the
one operation that does it (``mixing``, ``mixing_kernel``), where K/V live meanwhile (``microbatch_kv``), and the two
attentions that take upstream's place.

Imports ``upstream`` and ``common``.  The first three are pure Python.
"""
