"""``sla-plan``: what skip-layer attention costs in a pipeline, from the flags of a pretraining run, before it runs.

``cli`` (the command), ``flags`` (its own flags beside Megatron's), ``settle`` (the run that all flags describe, a
``job``), ``without_megatron`` (the same of ``known_flags``), ``traffic`` (bytes), ``compute`` (operations), ``program``
and ``timeline`` (a step, simulated), ``predict`` (SLA against dense), ``costs`` (the model beside the dense one),
``suggest`` (other layouts), ``figures`` (all of it), ``report``, ``as_json``, ``plot`` and ``draw`` (how it is shown;
``svg`` writes).  Only ``settle`` needs Megatron.
"""
