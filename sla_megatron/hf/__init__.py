"""Skip-layer attention for Hugging Face transformers.

The ``*_sla_gpt.py`` files are copied into exported folders and loaded from there with ``trust_remote_code``: they
import torch and transformers only, nothing of ours.  Nothing is imported here, so that ``sla_megatron`` works without
transformers.
"""
