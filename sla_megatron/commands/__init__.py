"""The commands, a folder each; ``cli.py`` is its ``main``.  They may import all of ours.

Of each other they import nothing, but for ``doctor``, which reads ``data``'s indices and lists ``patch``'s names, and
``evaluate``, which reads checkpoints as ``convert`` does.
Heavy imports are within functions: ``--help`` answers at once.
"""
