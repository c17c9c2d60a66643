"""Checkpoints of Megatron and folders of Hugging Face, each as the other."""
