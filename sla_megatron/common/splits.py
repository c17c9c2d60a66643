"""How Megatron divides a data set into training, validation and test, as ``--split`` says.

A part that gets nothing is not just empty: Megatron looks for tokens in it without end.
Needs no Megatron, whose import takes seconds.
"""

from __future__ import annotations

import re

#: The parts, in the order in which ``--split`` names their shares.
PARTS = ("train", "valid", "test")

#: Megatron's default.
DEFAULT_SPLIT = "969,30,1"


def split_ranges(split: str, sequences: int) -> dict[str, range]:
    """Which of a data set's sequences each part gets; a part with the share 0 is not built, and is left out.

    As ``megatron.core.datasets``: shares are normalised and added up, and each bound is rounded by itself.

    Raises:
        ValueError: if ``split`` is not up to three shares, one of them more than 0.
    """
    shares = [float(share) for share in re.findall(r"[.0-9]+", split)]
    if len(shares) > len(PARTS) or not any(shares):
        raise ValueError(f"{split}: expected up to three shares, such as {DEFAULT_SPLIT}")
    shares += [0.0] * (len(PARTS) - len(shares))
    # One after the other: Python's sum() of floats rounds less often than numpy's.
    whole = shares[0] + shares[1] + shares[2]
    ranges, begin = {}, 0.0
    for part, share in zip(PARTS, shares, strict=True):
        end = begin + share / whole
        if end > begin:
            ranges[part] = range(round(begin * float(sequences)), round(end * float(sequences)))
        begin = end
    return ranges


def without_empty_parts(sequences: int) -> str:
    """Shares of ``--split`` with which each part that is built has something, of 1 sequence or more."""
    return f"{sequences - 2},1,1" if sequences > 2 else "1,0,0"


def split_hint(sequences: int) -> str | None:
    """What a user should know of a data set this small, as one line; ``None`` if Megatron's default split fits it."""
    empty = [part for part, each in split_ranges(DEFAULT_SPLIT, sequences).items() if not each]
    if not empty or not sequences:
        return None
    built = "" if sequences > 2 else ", and --eval-iters 0"
    return (
        f"too few documents, {sequences}, for Megatron's default --split {DEFAULT_SPLIT}: {' and '.join(empty)} would "
        f"get none. Train with --split {without_empty_parts(sequences)}{built}, or with sets of their own"
    )
