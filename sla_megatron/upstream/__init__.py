"""How Megatron and torch are touched: declared, checked, replaced and put back.  Imports ``common``.

What is touched is declared where it is used; ``sla-patch registry`` lists it all.  Nothing here knows a folder above.
"""
