"""What a training run needs beside its model: data, loss, and a checkpoint writer that outlives a signal.

Imports all of ours but ``commands`` and the entry point.
"""
