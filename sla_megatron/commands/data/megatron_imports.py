"""What a worker needs of Megatron, imported once for all workers."""

from ...common.silence import without_announcements

with without_announcements():
    import megatron.core.tokenizers.text.libraries
    import megatron.core.tokenizers.utils.build_tokenizer  # noqa: F401
