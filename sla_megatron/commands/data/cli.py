"""``sla-data``: from any text to Megatron's indexed format.

sla-data tokenizer --input corpus.jsonl --vocab-size 32000 --output tokenizer.model
sla-data tokenize --input corpus.jsonl --output-prefix data/corpus \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --workers 8
sla-data submit --tasks 100 --input corpus --output-prefix data/corpus ... -- --time=4:00:00
sla-data inspect data/corpus
sla-data merge --output-prefix data/all data/corpus data/more
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from ...common.errors import one_line_errors
from ...common.flag_types import OneLineParser
from . import inspect_command, merge_command, submit_command, task_command, tokenize_command, tokenizer_command

COMMANDS = (tokenizer_command, tokenize_command, submit_command, task_command, inspect_command, merge_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.  What cannot be done ends it: one line on stderr, exit status 2; an unsound data set, 1."""
    parser = OneLineParser(prog="sla-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_command(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    # Elsewhere what is behind -- are names that begin with a dash.
    end = words.index("--") if words[:1] == ["submit"] and "--" in words else len(words)
    args = parser.parse_args(words[:end])
    args.options = words[end + 1 :]
    try:
        with one_line_errors("sla-data", all_ranks=True), _environment():
            status = args.command(args)
    except KeyboardInterrupt:
        print("sla-data: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    if status:
        sys.exit(status)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Within the block no GPU is looked for, and Megatron need not wonder aloud which rank it is.

    Tokenizers get no threads: a document is encoded by one, and workers are as many as there are to be.
    """
    before = dict(os.environ)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "RANK": "0", "TOKENIZERS_PARALLELISM": "false"})
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


if __name__ == "__main__":
    main()
