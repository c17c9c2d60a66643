"""What a worker needs, imported once for all workers."""

from ...common.announcements import quiet

with quiet():
    import megatron.core.datasets.indexed_dataset
    import megatron.core.tokenizers.utils.build_tokenizer  # noqa: F401
