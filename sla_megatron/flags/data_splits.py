"""Whether each part of the data that a run will build, training, validation and test, has anything in it.

Upstream builds every part that has a share in ``--split``, used or not, and looks for tokens without end where one is
empty; a part that it needs and that nothing says the data of ends the run in a traceback, or at once and in silence.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Sequence

from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path
from megatron.training.utils import get_blend_and_blend_per_split

from ..common.errors import FlagError, StartError
from ..common.splits import DEFAULT_SPLIT, PARTS, split_ranges, without_empty_parts

#: How many lengths of sequences are looked at once.
_LENGTHS = 1 << 16


def require_data_of_each_part(args: Namespace) -> None:
    """Refuse validated arguments by which a part that is built, or needed, has no token, or no whole sequence.

    Reads the index of each data set, but for those in object storage.

    Raises:
        FlagError: naming the part, and how many documents there are.
        StartError: if no flag names data.
    """
    if args.mock_data:
        # Upstream then splits evenly, whatever --split says.
        _require_parts(args, PARTS)
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    if blend is not None:
        _require_parts(args, _parts(args))
        flag = "--data-path" if args.data_args_path is None else "--data-args-path"
        for prefix in dict.fromkeys(blend[0]):
            _require_split(args, flag, prefix, _blends_whole(*blend))
    elif per_split is not None:
        given = {part: each for part, each in zip(PARTS, per_split, strict=True) if each is not None}
        _require_parts(args, list(given))
        for part, each in given.items():
            flag = f"--{part}-data-path" if args.per_split_data_args_path is None else "--per-split-data-args-path"
            for prefix in dict.fromkeys(each[0]):
                if args.sft:
                    _conversations(flag, prefix)
                    continue
                _require_tokens(flag, prefix, _needed(args, part, _blends_whole(*each)))
    else:
        flags = [f"--{part}-data-path" for part in PARTS]
        raise StartError(f"no data: expected --data-path, {', '.join(flags)} or --mock-data")


def _blends_whole(prefixes: Sequence[str], weights: Sequence[float] | None) -> bool:
    """Whether each data set is read once, for want of weights, and blended by its samples, of which none has 0."""
    return weights is None and len(prefixes) > 1


def _needed(args: Namespace, part: str, whole: bool) -> int:
    """How many tokens a data set needs: one, or where it is not read over and over a sequence with its last label."""
    return args.seq_length + 1 if whole or (args.full_validation and part == "valid") else 1


def _parts(args: Namespace) -> list[str]:
    """The parts that ``--split`` gives a share."""
    try:
        # Of so many sequences that each share is some.
        return list(split_ranges(args.split or "", 1 << 50))
    except ValueError:
        raise FlagError("--split", args.split, f"up to three shares, such as {DEFAULT_SPLIT}") from None


def _require_parts(args: Namespace, parts: Sequence[str]) -> None:
    """That what is needed is built, and nothing that Megatron cannot evaluate beside it."""
    if "train" not in parts and not args.skip_train:
        if args.split is None:
            raise StartError("no data to train on: expected --train-data-path, or --skip-train")
        raise FlagError("--split", args.split, "a share of the data for training, the first one")
    if "valid" not in parts and (args.full_validation or args.eval_iters):
        flag, value = ("--full-validation", True) if args.full_validation else ("--eval-iters", args.eval_iters)
        raise FlagError(flag, value, "data to validate on, or --eval-iters 0")
    if "test" in parts and args.full_validation:
        raise FlagError(
            "--full-validation", True, "no test data beside it (as with --split 99,1,0): Megatron takes one"
        )


def _require_split(args: Namespace, flag: str, prefix: str, whole: bool) -> None:
    if args.sft:
        lines = _conversations(flag, prefix)
        for part, among in split_ranges(args.split, lines).items():
            if not among:
                raise FlagError("--split", args.split, f"conversations in each part: {part} gets none of {lines}")
        return
    index = _index(flag, prefix)
    if index is None:
        return
    lengths = index.sequence_lengths
    for part, sequences in split_ranges(args.split, len(lengths)).items():
        needed = _needed(args, part, whole)
        tokens = _tokens(lengths, sequences, needed)
        if tokens >= needed:
            continue
        wanted = "tokens" if needed == 1 else f"{needed} tokens or more, a whole sequence,"
        other = without_empty_parts(len(lengths))
        helps = tokens == 0 and all(_tokens(lengths, each, needed) >= needed for each in _ranges(other, lengths))
        raise FlagError(
            "--split",
            args.split.replace(" ", ""),
            f"{wanted} in each part: {part} gets {tokens or 'none'} of the {_documents(index)} of {prefix}"
            + (f" (--split {other} would do; a share of 0 is not built)" if helps else ""),
        )


def _ranges(split: str, lengths: Sequence[int]) -> Iterable[range]:
    return split_ranges(split, len(lengths)).values()


def _require_tokens(flag: str, prefix: str, needed: int) -> None:
    index = _index(flag, prefix)
    if index is None:
        return
    tokens = _tokens(index.sequence_lengths, range(len(index.sequence_lengths)), needed)
    if tokens < needed:
        wanted = "data with tokens" if needed == 1 else f"{needed} tokens or more, a whole sequence"
        raise FlagError(flag, prefix, f"{wanted}: its {_documents(index)} have {tokens or 'none'}")


def _conversations(flag: str, path: str) -> int:
    """How many conversations a file of ``--sft`` has, one a line."""
    try:
        with open(path, "rb") as file:
            lines = sum(1 for line in file if line.strip())
    except OSError:
        lines = 0
    if not lines:
        raise FlagError(flag, path, 'a file with --sft, each line {"messages": [{"role": ..., "content": ...}, ...]}')
    return lines


def _index(flag: str, prefix: str) -> IndexedDataset | None:
    """The index of a data set; ``None`` in object storage."""
    if "://" in prefix:
        return None
    if not IndexedDataset.exists(prefix):
        raise FlagError(flag, prefix, "PREFIX.bin and PREFIX.idx of the data")
    if not os.path.getsize(get_bin_path(prefix)):
        raise FlagError(flag, prefix, "data with tokens: its .bin is empty")
    return IndexedDataset(prefix)


def _documents(index: IndexedDataset) -> str:
    """``40 documents``; upstream splits sequences, of which a document may have several."""
    sequences, documents = len(index.sequence_lengths), len(index.document_indices) - 1
    return f"{documents} documents" if sequences == documents else f"{sequences} sequences ({documents} documents)"


def _tokens(lengths: Sequence[int], sequences: range, enough: int) -> int:
    """How many tokens ``sequences`` have, counted no further than ``enough``: of terabytes, the first lengths do."""
    tokens = 0
    for start in range(sequences.start, sequences.stop, _LENGTHS):
        tokens += int(lengths[start : min(start + _LENGTHS, sequences.stop)].sum())
        if tokens >= enough:
            break
    return tokens
