"""``sla-sweep``: the grid of the paper (arXiv 2406.11274), distance by skip groups by context by size by seed.

``grid``, ``entries``, ``values``, ``flag_words`` and ``yaml_file`` (the file), ``setting`` (skip-layer attention of a
run), ``equal_parameters`` (a wider MLP), ``settle`` (Megatron's word on it), ``results_folder`` (what was begun, what
is finished), ``training`` and ``training_log`` (one run), ``local`` and ``slurm`` (all of them), ``summary``,
``report`` and ``plot``.
"""
