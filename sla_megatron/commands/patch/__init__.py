"""``sla-patch``: ``--sla`` in ``pretrain_gpt.py`` of a Megatron-LM checkout, and taken out again.

``diff.py`` reads a unified diff and applies it to a text; ``checkout.py`` knows the patches and what is in a checkout;
``cli.py`` is the command.  Nothing here imports Megatron or torch, but for ``sla-patch registry DIR``.
"""
