"""``sla-doctor``: whether a pretraining job can run where it is about to, before it does.

``cli.py`` is the command, ``examination.py`` the order of its checks.  One module for each kind of check
(``versions.py``, ``upstream.py``, ``gpus.py``, ``job.py``, ``data_files.py``, ``checkpoints.py``, ``layout.py``), each
check a function that returns what is well, or raises what is not (``finding.py``).  ``meeting.py`` is how the ranks
hear of each other, ``report.py`` what rank 0 makes of the nodes' findings.
"""
