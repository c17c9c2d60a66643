"""SLA-GPT for vLLM: a plugin that keeps the formula's cache.

Imports the folder above alone of this package, so that it runs in an environment without Megatron, as vLLM's is.  It is
not copied into exported folders.
"""
