"""Which keys each query reads, against the definition: those of its own document that are not after it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.attention.stretches import documents_of_samples, natural_order, stretches


def held_positions(length: int, size: int, rank: int) -> list[int]:
    """A context-parallel rank's positions: of 2C chunks one from the front, one from the back."""
    if size == 1:
        return list(range(length))
    width = length // (2 * size)
    return [chunk * width + i for chunk in (rank, 2 * size - 1 - rank) for i in range(width)]


@st.composite
def cut_sequences(draw: st.DrawFn) -> tuple[int, tuple[int, ...], int]:
    size = draw(st.sampled_from([1, 2, 3, 4]))
    length = draw(st.integers(1, 6)) * (2 * size if size > 1 else 1)
    starts = draw(st.sets(st.integers(0, length - 1), max_size=4))
    return length, tuple(sorted(starts | {0})), size


@given(cut_sequences())
def test_each_query_reads_its_document_up_to_itself(case: tuple[int, tuple[int, ...], int]) -> None:
    length, documents, size = case
    document = [sum(start <= position for start in documents) for position in range(length)]
    for rank in range(size):
        positions, next_row = held_positions(length, size, rank), 0
        for stretch in stretches(length, documents, size, rank):
            assert stretch.rows.start == next_row < stretch.rows.stop
            next_row = stretch.rows.stop
            for place in range(stretch.num_rows):
                query = positions[stretch.rows.start + place]
                read = range(stretch.keys.start, stretch.keys.stop - (stretch.num_rows - 1 - place))
                assert list(read) == [key for key in range(query + 1) if document[key] == document[query]]
        assert next_row == len(positions)


@given(st.integers(2, 8))
def test_gathered_chunks_in_the_order_of_the_sequence(size: int) -> None:
    gathered = [position for rank in range(size) for position in held_positions(2 * size, size, rank)]
    assert [gathered[place] for place in natural_order(size)] == list(range(2 * size))


@given(st.lists(st.sets(st.integers(1, 7), max_size=4), min_size=1, max_size=4))
def test_documents_counted_over_all_samples(samples: list[set[int]]) -> None:
    boundaries = [0]
    for number, inner in enumerate(samples):
        boundaries += [8 * number + start for start in sorted(inner)] + [8 * (number + 1)]
    assert documents_of_samples(boundaries, len(samples), 8) == tuple((0, *sorted(inner)) for inner in samples)
