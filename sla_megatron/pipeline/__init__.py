"""K/V between pipeline stages: which travel, how, and what stays resident.

Imports ``attention``, ``upstream`` and ``common``.

Pure Python, shared by the transport and by ``sla-plan``: ``layout`` (layers of each virtual stage), ``routes`` (what
crosses each hop), ``schedule`` (the order of passes on a rank), ``payload`` (sizes), ``residency`` (what a rank holds).

Run time: ``packing`` (one tensor a hop), ``resident_kv`` (K/V that wait on a rank), ``step`` (one run of a schedule),
``communicator`` and ``transport`` (the seams with Megatron's schedules).
"""
