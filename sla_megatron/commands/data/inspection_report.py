"""What ``sla-data inspect`` prints."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy
from tqdm import tqdm

from ...common.waiting import bar
from .contents import Documents, document_figures, empty_sequences, scan
from .errors import DataError
from .histogram import Bin, as_text, check_plot, histogram, plot
from .inspection import Index, index_faults, layout_fault, open_index
from .known_tokenizer import Known, Tokenizers, find_manifest
from .progress import waiting_for

#: Progress is shown for ``.bin`` files from this many bytes on.
_PATIENCE = 10**8


def inspect(args: argparse.Namespace) -> int:
    """Print all about each of ``args.prefix``; returns the exit status.

    Raises:
        DataError: if a flag is wrong, or the only data set cannot be read.
        TokenizerError: if flags name a tokenizer that cannot be built.
    """
    if args.plot is not None:
        data = [Path(f"{prefix}{suffix}") for prefix in args.prefix for suffix in (".bin", ".idx", ".json")]
        check_plot(args.plot, args.overwrite, data)
    tokenizers = Tokenizers(args)
    status = 0
    histograms: dict[str, list[Bin]] = {}
    for number, prefix in enumerate(args.prefix):
        if number:
            print()
        try:
            faults, bins = _report(prefix, args, tokenizers)
        except DataError as error:
            if len(args.prefix) == 1:
                raise
            # The others are reported all the same.
            print(f"sla-data: error: {error}", file=sys.stderr, flush=True)
            status = 2
            continue
        status = max(status, 1 if faults else 0)
        if bins:
            histograms[prefix] = bins
    if args.plot is not None and histograms:
        plot(histograms, args.plot)
        print(f"\n{args.plot}: written")
    return status


def _report(prefix: str, args: argparse.Namespace, tokenizers: Tokenizers) -> tuple[list[str], list[Bin]]:
    """Print all about one data set; returns the lines about what is wrong with it, and its histogram."""
    index = open_index(prefix)
    manifest = find_manifest(prefix)
    print(prefix)
    fault = layout_fault(index)
    with waiting_for("checking the index", quick=True):
        faults = [fault] if fault is not None else index_faults(index)
    bins = []
    if not faults:
        known = tokenizers.of(manifest)
        eod = None if known is None or args.no_scan else known.eod
        with _progress(index, "ends of documents", needed=eod is not None) as drawn:
            documents = document_figures(index, eod, drawn.update)
        _print_counts(index, documents)
        faults += [] if manifest is None else manifest.faults(index, documents)
        faults += _print_tokens(index, documents, known, tokenizers, args.no_scan)
        bins = histogram(documents.lengths)
        print("", *(f"  {line}" for line in as_text(bins)), "", sep="\n")
        _show(index, known, args)
    for line in faults:
        print(f"  wrong: {line}")
    parts = "the index was" if args.no_scan else "the index and all tokens were"
    print(f"  not sound: {len(faults)} failed" if faults else f"  sound: {parts} checked")
    return faults, bins


def _line(name: str, text: str) -> None:
    print(f"  {name:<18} {text}")


def _print_counts(index: Index, documents: Documents) -> None:
    empty, lengths = empty_sequences(index), documents.lengths
    some = "" if empty.first is None else f", {empty.count:,} of them empty, the first is {empty.first}"
    _line("documents", f"{index.documents:,}")
    _line("sequences", f"{index.sequences:,}{some}{', with modes' if index.has_modes else ''}")
    _line("tokens", f"{index.tokens:,} ({index.dtype}, {index.bin_bytes:,} bytes)")
    if lengths.documents:
        least, median, most = (f"{lengths.percentile(percent):,}" for percent in (0, 50, 100))
        _line("tokens a document", f"mean {lengths.mean:,.1f}, least {least}, median {median}, most {most}")
        _line("", ", ".join(f"{percent}% {lengths.percentile(percent):,}" for percent in (5, 25, 75, 95, 99)))


def _print_tokens(
    index: Index, documents: Documents, known: Known | None, tokenizers: Tokenizers, no_scan: bool
) -> list[str]:
    """Print the tokenizer, how documents end and which ids there are; returns what is wrong with the ids."""
    if known is not None:
        _line("tokenizer", f"{known.name}, {known.vocabulary:,} tokens{known.origin}")
    else:
        _line("tokenizer", tokenizers.why_none or "not known: --tokenizer-type, --tokenizer-model")
    if documents.ended is not None:
        first = "" if documents.not_ended is None else f"; the first that does not is {documents.not_ended}"
        _line(
            "end of document", f"{documents.ended:,} of {index.documents:,} documents end with token {known.eod}{first}"
        )
    if no_scan:
        return []
    with _progress(index, "token ids") as drawn:
        ids = scan(index, None if known is None else known.vocabulary, drawn.update)
    different = "" if ids.different is None else f", {ids.different:,} different ones"
    _line("token ids", f"{ids.least:,} to {ids.greatest:,}{different}")
    return [] if ids.fault is None else [ids.fault]


def _progress(index: Index, what: str, needed: bool = True) -> AbstractContextManager[tqdm]:
    """A bar over the bytes of ``.bin``, on stderr, if that takes a while."""
    shown = needed and index.bin_bytes >= _PATIENCE
    return bar(what, index.bin_bytes, disable=not shown)


def _show(index: Index, known: Known | None, args: argparse.Namespace) -> None:
    """Print the first documents."""
    count = min(args.documents, index.documents)
    if not count:
        return
    ends = index.mapped(index.document_indices)
    for number in range(count):
        first, end = (int(at) for at in ends[number : number + 2])
        tokens = int(index.mapped(index.lengths, first, end - first).sum()) if end > first else 0
        print(f"  document {number}: {tokens:,} tokens" + (f" in {end - first} sequences" if end - first > 1 else ""))
        for line in _text(index, first, end, known, args.characters).split("\n"):
            print(f"    {line}".rstrip())
    print()


def _text(index: Index, first: int, end: int, known: Known | None, characters: int) -> str:
    """The beginning of the document in sequences ``first`` to ``end``; ids if there is no text of them."""
    wanted = max(characters, 8)
    while True:
        # Of a long document only as much as is shown; a character may take several tokens.
        ids, whole = _ids(index, first, end, wanted)
        valid = ids.size == 0 or (ids.min() >= 0 and known is not None and ids.max() < known.vocabulary)
        text = known.decode(ids.tolist()) if known and valid else " ".join(map(str, numpy.asarray(ids)))
        # The last characters of a part may be broken.
        if whole or len(text) >= characters + 4:
            break
        wanted *= 2
    if len(text) > characters or not whole:
        text = text[:characters] + " ..."
    return _printable(text)


def _ids(index: Index, first: int, end: int, count: int) -> tuple[numpy.ndarray, bool]:
    """The first ``count`` token ids of sequences ``first`` to ``end``, and whether these are all."""
    if first == end:
        return numpy.zeros(0, index.dtype), True
    # Of an index without faults, sequences follow each other.
    start = int(index.mapped(index.pointers, first, 1)[0])
    there = int(index.mapped(index.lengths, first, end - first).sum())
    return numpy.fromfile(index.bin, index.dtype, min(there, count), offset=start), there <= count


def _printable(text: str) -> str:
    """``text`` without what would steer a terminal, in characters that stdout has."""
    shown = "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)
