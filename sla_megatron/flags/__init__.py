"""The flags: what they are, every check of them, and what of them travels with a checkpoint.

Imports ``pipeline``, ``attention``, ``cpu``, ``upstream`` and ``common``.  ``arguments.settled_args`` is the one way
from a command line to arguments, for training and for every command.
"""
