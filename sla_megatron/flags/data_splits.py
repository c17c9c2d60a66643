"""Whether each part of the data that a run will build, training, validation and test, has anything in it.

Upstream builds every part with a share in ``--split``, used or not, and never ends where one is empty.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.utils import get_blend_and_blend_per_split

from ..common.errors import FlagError, StartError
from ..common.splits import PARTS, split_ranges, without_empty_parts

#: How many lengths of sequences are looked at once.
_LENGTHS = 1 << 16

_PART_FLAGS = ("--train-data-path", "--valid-data-path", "--test-data-path")
_NONE_OF_THEM = f"--data-path, {', '.join(_PART_FLAGS)} or --mock-data"


def require_data_of_each_part(args: Namespace) -> None:
    """Refuse validated arguments whose data leave a part that is built, or needed, without a token.

    Reads the index of each data set, but for those in object storage.

    Raises:
        FlagError: naming the part, and how many documents there are.
        StartError: if no flag names data.
    """
    if args.mock_data:
        _require_evaluation(args, PARTS)
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    if blend is not None:
        _require_evaluation(args, _parts_of(args))
        for prefix in dict.fromkeys(blend[0]):
            _require_split(args, "--data-path" if args.data_path else "--data-args-path", prefix)
    elif per_split is not None:
        _require_evaluation(args, [part for part, each in zip(PARTS, per_split, strict=True) if each is not None])
        for flag, each in zip(_PART_FLAGS, per_split, strict=True):
            for prefix in dict.fromkeys(each[0] if each is not None else ()):
                named = "--per-split-data-args-path" if args.per_split_data_args_path else flag
                _require_tokens(named, prefix)
    else:
        raise StartError(f"no data: expected {_NONE_OF_THEM}")


def _parts_of(args: Namespace) -> list[str]:
    try:
        # A number of sequences of which every share gets some.
        return list(split_ranges(args.split, 1 << 50))
    except ValueError as error:
        raise FlagError("--split", args.split, f"three shares, such as 969,30,1 ({error})") from error


def _require_evaluation(args: Namespace, parts: Iterator[str] | list[str] | tuple[str, ...]) -> None:
    """What is needed is built: upstream finds out after a while, when it first evaluates, in a traceback."""
    if "train" not in parts and not args.skip_train:
        raise FlagError("--split", args.split, "a share for training") if args.split else StartError(
            "no data to train on: expected --train-data-path beside the others, or --skip-train"
        )
    if "valid" not in parts and (args.full_validation or args.eval_iters):
        raise FlagError("--eval-iters", args.eval_iters, "0 without data to validate on")
    if "test" in parts and args.full_validation:
        raise FlagError(
            "--full-validation", True, "no test set beside it (--split 99,1,0): Megatron cannot evaluate both"
        )


def _require_split(args: Namespace, flag: str, prefix: str) -> None:
    """Each part that ``--split`` makes of one data set has a token."""
    index = _index(flag, prefix)
    if index is None:
        return
    count = len(index.sequence_lengths)
    for part, sequences in split_ranges(args.split, count).items():
        if not _has_tokens(index, sequences):
            shares = f" (with {without_empty_parts(count)} each has one; a part with 0 is not built)" if count else ""
            raise FlagError(
                "--split", args.split, f"a document for each part: {part} gets none of {_documents(index)}, {prefix}{shares}"
            )


def _require_tokens(flag: str, prefix: str) -> None:
    index = _index(flag, prefix)
    if index is not None and not _has_tokens(index, range(len(index.sequence_lengths))):
        raise FlagError(flag, prefix, f"data with tokens: there are {_documents(index)} with none")
