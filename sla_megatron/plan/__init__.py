"""``sla-plan``: what skip-layer attention costs in a pipeline, from the flags of a pretraining run, before it runs.

``cli`` (the command), ``flags`` (its own flags beside Megatron's), ``job`` (the run that they describe), ``traffic``
(bytes), ``compute`` (floating-point operations), ``program`` and ``timeline`` (a step, simulated), ``predict`` (SLA
against dense), ``suggest`` (other layouts), ``report`` and ``as_json`` (what is printed), ``plot`` (the timeline drawn).
"""
