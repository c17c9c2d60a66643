"""What every folder may use: errors, files, flag types, tables, pictures, environment, launchers, tokenizers, waiting,
amounts, Megatron's log.

Imports nothing of ours; torch and Megatron only within the functions that need them.
"""
