"""How the tokens of a batch lie: in documents that share a sample, and over context-parallel ranks.

By Megatron's definitions, spelled out, with nothing of this project: what ``parity_worker`` gives a model, and expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Documents:
    """Where documents start in each sample of ``length`` tokens, and how Megatron packs them: samples side by side
    (``sbhd``, for torch's attention) or one after the other (``thd``)."""

    starts: list[list[int]]
    length: int
    layout: str

    @property
    def are_whole_samples(self) -> bool:
        return all(starts == [0] for starts in self.starts)

    def _ends(self) -> list[list[tuple[int, int]]]:
        return [list(zip(starts, [*starts[1:], self.length], strict=True)) for starts in self.starts]

    def positions(self) -> Any:
        """``[b, s]``, each token's place in its document."""
        import torch

        samples = [torch.cat([torch.arange(stop - start) for start, stop in ends]) for ends in self._ends()]
        return torch.stack(samples)

    def read_token(self, changed: int) -> Any:
        """``[b, s]``, whether a token is of the document of the one at ``changed``, and not before it."""
        import torch

        ends = [next(stop for start, stop in ends if start <= changed < stop) for ends in self._ends()]
        places = torch.arange(self.length).expand(len(ends), -1)
        return (places >= changed) & (places < torch.tensor(ends)[:, None])

    def each_alone(self, reference: Any, weights: dict[str, Any], tokens: Any) -> Any:
        """The reference's logits ``[b, s, vocabulary]``, every document a run of its own."""
        import torch

        if self.are_whole_samples:
            return reference.logits(weights, tokens)
        samples = [
            torch.cat([reference.logits(weights, sample[None, start:stop]) for start, stop in ends], dim=1)
            for sample, ends in zip(tokens, self._ends(), strict=True)
        ]
        return torch.cat(samples)

    def packed_sequences(self) -> Any:
        """What Megatron's data loader says of documents that share a sample; ``None`` where none does."""
        import torch
        from megatron.core.packed_seq_params import PackedSeqParams

        if self.are_whole_samples:
            return None
        starts = [number * self.length + start for number, starts in enumerate(self.starts) for start in starts]
        boundaries = torch.tensor([*starts, len(self.starts) * self.length], dtype=torch.int32).cuda()
        return PackedSeqParams(
            qkv_format=self.layout,
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=self.length,
            max_seqlen_kv=self.length,
        )


def chunks_of_ranks() -> list[list[int]]:
    """Which of ``2C`` equal chunks of the sequence each context-parallel rank holds, in its order: the first of what is
    left and the last of it, so that causal attention costs all of them the same."""
    from megatron.core import parallel_state

    size = parallel_state.get_context_parallel_world_size()
    return [[rank, 2 * size - 1 - rank] for rank in range(size)] if size > 1 else [[0]]


def share(tensor: Any) -> Any:
    """``[b, s]`` as this context-parallel rank's ``[b, s/C]``."""
    import torch
    from megatron.core import parallel_state

    mine = chunks_of_ranks()[parallel_state.get_context_parallel_rank()]
    chunks = tensor.chunk(sum(map(len, chunks_of_ranks())), dim=1)
    return torch.cat([chunks[chunk] for chunk in mine], dim=1)


def whole_sequence(tensor: Any) -> Any:
    """``[b, s/C, ...]`` of each context-parallel rank as ``[b, s, ...]``."""
    import torch
    from megatron.core import parallel_state

    held = chunks_of_ranks()
    shares = [torch.empty_like(tensor) for _ in held]
    torch.distributed.all_gather(shares, tensor.contiguous(), group=parallel_state.get_context_parallel_group())
    found = {
        number: chunk
        for mine, part in zip(held, shares, strict=True)
        for number, chunk in zip(mine, part.chunk(len(mine), dim=1), strict=True)
    }
    return torch.cat([found[number] for number in sorted(found)], dim=1)
