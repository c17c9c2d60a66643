"""``sla-eval``: lm-eval's own command, with a model ``sla_megatron`` that is a Megatron checkpoint as it is.

``cli`` (the command), ``arguments`` (what the model is told), ``megatron_lm`` (the model that lm-eval sees),
``causal_lm`` (what transformers' ``generate`` sees), ``checkpoint_model`` (Megatron's model of the checkpoint, over all
ranks), ``ranks`` (which ranks those are) and ``text`` (the checkpoint's tokenizer).  Of the other commands it imports
``convert``, which knows checkpoints.
"""
