"""The commands, a folder each; ``cli.py`` is its ``main``.  They may import all of ours.

Of each other they import nothing, but for ``doctor``, which reads ``data``'s indices and lists ``patch``'s names.
Heavy imports are within functions: ``--help`` answers at once.
"""
