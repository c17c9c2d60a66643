"""What a worker needs, imported once for all workers."""

from ...common.silence import without_announcements

with without_announcements():
    import megatron.core.datasets.indexed_dataset
    import megatron.core.tokenizers.utils.build_tokenizer  # noqa: F401
