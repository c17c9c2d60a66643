"""Tensors between layers, over pipeline stages: which travel, how, and what stays resident.

Imports ``upstream`` and ``common``.

Pure Python, shared by the transport and by ``sla-plan``: ``declarations`` (what layers make and read), ``layout``
(layers of each virtual stage), ``routes`` (what crosses each hop), ``schedule`` (the order of passes on a rank),
``payload`` (sizes), ``residency`` (what a rank holds).

Run time: ``waiting`` (between two layers of a block), ``packing`` (one tensor a hop), ``resident`` (what waits on a
rank), ``step`` (one run of a schedule), ``communicator`` and ``transport`` (the seams with Megatron's schedules);
``copying`` and ``joining`` move heads of tensors.
"""
