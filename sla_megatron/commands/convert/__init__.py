"""``sla-convert``: checkpoints of Megatron and folders of Hugging Face, each as the other.

``cli`` (flags) and ``commands`` (what they do); ``architecture`` and ``mapping`` (both formats, as tables);
``stored_arguments`` with ``model_arguments`` and ``harmless_arguments`` (what an export may not pass over); readers,
``foreign`` (other architectures), ``weight_files``, writers and ``output``; ``megatron_model``, ``trained_model`` and
``verify`` (Megatron's own model in this process); ``tokenizer``, ``tokenizer_place`` and ``tokenizer_formats``.
"""
