"""The job's data: indexed files that agree with themselves, a tokenizer, and a folder for Megatron's index cache.

Nothing is scanned: headers, sizes and last entries are read, so that terabytes take milliseconds.
``sla-data inspect`` reads all of it.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from ...common.errors import StartError, flag_of
from ..data.errors import DataError
from ..data.inspection import Index, layout_fault, open_index
from .finding import Doubt, Fault, Skipped, error_line
from .folders import require_writable

_DATA_FLAGS = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
_DATA_FLAGS += ("per_split_data_args_path",)


def data_files(args: Namespace, vocabulary: int | None) -> str:
    """Every prefix of the job has an index and tokens that agree.

    Args:
        vocabulary: how many tokens the tokenizer has, if that is known.
    """
    # Megatron takes seconds to import.
    from ...flags.data_splits import require_data_of_each_part

    prefixes = data_prefixes(args)
    faults, indices = [], []
    for prefix in prefixes:
        try:
            indices.append(_sound_index(prefix))
        except DataError as error:
            text = str(error)
            faults.append(text if "expected" in text else f"{text}: expected PREFIX.bin and PREFIX.idx of the data")
    if faults:
        more = f" (and {len(faults) - 1} more of {len(prefixes)} prefixes)" if len(faults) > 1 else ""
        raise Fault(f"{faults[0]}{more}")
    try:
        require_data_of_each_part(args)
    except StartError as error:
        raise Fault(error.reason) from error
    narrow = [index for index in indices if vocabulary is not None and vocabulary - 1 > _greatest_id(index)]
    if narrow:
        raise Doubt(
            f"{narrow[0].bin} holds {narrow[0].dtype} ids, up to {_greatest_id(narrow[0])}, and the vocabulary has "
            f"{vocabulary}: was it written with another tokenizer?"
        )
    tokens, size = sum(index.tokens for index in indices), sum(index.bin_bytes for index in indices)
    types = ", ".join(sorted({str(index.dtype) for index in indices}))
    plural = "es" if len(prefixes) > 1 else ""
    return f"{len(prefixes)} prefix{plural}, {tokens} tokens ({types}), {size / 1e9:.3g} GB"


def data_prefixes(args: Namespace) -> list[str]:
    """All prefixes that the flags name, once each."""
    from megatron.training.utils import get_blend_and_blend_per_split

    if args.mock_data:
        raise Skipped("--mock-data: none is read")
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except Exception as error:
        flag = next((flag_of(name) for name in _DATA_FLAGS if getattr(args, name, None) is not None), "--data-path")
        raise Fault(f"{flag}: {error_line(error)}") from error
    named: Iterable[str] = [
        prefix for each in (blend, *(per_split or ())) if each is not None for prefix in (each[0] or ())
    ]
    prefixes = list(dict.fromkeys(named))
    if not prefixes:
        raise Fault("no data: expected --data-path, --train-data-path or --mock-data")
    if any("://" in prefix for prefix in prefixes):
        raise Skipped("data in object storage are not examined")
    return prefixes


def _sound_index(prefix: str) -> Index:
    """The header of ``prefix``; raises :class:`DataError` unless the sizes of both files are those it implies."""
    index = open_index(prefix)
    fault = layout_fault(index) or _end_fault(index)
    if fault is not None:
        raise DataError(fault)
    return index


def _end_fault(index: Index) -> str | None:
    """How ``.bin`` disagrees with where the index says that the last sequence ends."""
    if index.sequences == 0:
        return f"{index.idx}: no sequences, expected at least one"
    last = index.sequences - 1
    length, start = int(index.mapped(index.lengths, last, 1)[0]), int(index.mapped(index.pointers, last, 1)[0])
    expected = start + length * index.dtype.itemsize
    if index.bin_bytes != expected:
        return f"{index.bin}: {index.bin_bytes} bytes, expected {expected} by {index.idx.name}"
    documents = int(index.mapped(index.document_indices, index.boundaries - 1, 1)[0]) if index.boundaries else None
    if documents != index.sequences:
        return f"{index.idx}: the last document index is {documents}, expected {index.sequences}"
    return None


def _greatest_id(index: Index) -> int:
    import numpy

    return int(numpy.iinfo(index.dtype).max)


def vocabulary_size(args: Namespace) -> int:
    """How many tokens the job's tokenizer has, which Megatron builds as the job will.

    Raises:
        Fault: if a file of it cannot be read, or it does not fit ``--padded-vocab-size``.
    """
    from ...common.tokenizers import DEFAULTS, TokenizerError, build

    try:
        size = int(build(Namespace(**{**DEFAULTS, **vars(args)})).vocab_size)
    except TokenizerError as error:
        raise Fault(f"{error}: expected files that --tokenizer-type {args.tokenizer_type} reads") from error
    padded = getattr(args, "padded_vocab_size", None)
    if padded is not None and padded < size:
        raise Fault(f"--padded-vocab-size {padded}: expected at least {size}, the tokenizer's vocabulary")
    return size


def cache_folder(args: Namespace, is_first_node: bool) -> str:
    """Where Megatron keeps its shuffled indices can be written, on the node that writes them."""
    if not is_first_node:
        raise Skipped("written by rank 0's node alone")
    if args.data_cache_path is not None:
        where = require_writable(Path(args.data_cache_path), "--data-cache-path")
        return f"{args.data_cache_path}{where}"
    if args.mock_data:
        raise Skipped("--mock-data: no index is kept")
    # Upstream then keeps it beside the data.
    folders = sorted({os.path.dirname(os.path.abspath(prefix)) for prefix in data_prefixes(args)})
    for folder in folders:
        try:
            require_writable(Path(folder) / "cache", "the data's own folder")
        except Fault as fault:
            raise Fault(f"{fault}, or --data-cache-path") from fault
    return ", ".join(f"{folder}/cache" for folder in folders)
