"""A sentencepiece model of the text of a job: a sample of its documents, training, the file.

The sample is drawn while everything is read once: the documents whose keyed hashes are largest, as many as have the
size asked for.  Which ones these are depends on no order, so neither does the model.
"""

from __future__ import annotations

import heapq
import io
import os
import re
import shlex
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from ...common.files import write_whole
from ...common.replacing import replaced_input
from ...common.waiting import bar
from .documents import Fault, count_lines, fault_message
from .errors import DataError, file_errors
from .inputs import Inputs
from .progress import waiting_for

MODEL_TYPES = ("bpe", "unigram")
NORMALIZATIONS = ("identity", "nmt_nfkc")
#: Ids of the control tokens.  Megatron ends documents with eos, and needs a pad that is none of the others.
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
CONTROL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
NEWLINE = "\n"
#: sentencepiece writes a space as this character: where a text has it, a space comes back.
SPACE_MARK = "\u2581"
#: What ``--character-coverage`` may be.
COVERAGE = (0.98, 1.0)

_BYTES = 256
_DIGEST_BYTES = 8
# sentencepiece leaves out sentences longer than the first; lines longer than the second come to it in pieces.
_SENTENCE_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
# Of the sample, what bytes a token are measured on.
_MEASURED_BYTES = 8 * 10**6


@dataclass(frozen=True)
class ModelSettings:
    """What a model is like, apart from its text; with the defaults any text without U+2581 comes back unchanged.

    Attributes:
        vocab_size: tokens, all of them: control tokens, symbols and bytes too.
        model_type: of :data:`MODEL_TYPES`.
        byte_fallback: whether 256 tokens stand for the bytes of characters that have none.
        character_coverage: share of the sample's characters that get tokens, within :data:`COVERAGE`.
        normalization: of :data:`NORMALIZATIONS`; ``identity`` changes nothing.
        user_symbols: texts that always are one token; a newline is one besides them.
        split_digits: whether each digit is a token.
        threads: of a unigram model, whose scores depend on it in their last digits; bpe takes one.
    """

    vocab_size: int
    model_type: str = "bpe"
    byte_fallback: bool = True
    character_coverage: float = 0.9995
    normalization: str = "identity"
    user_symbols: tuple[str, ...] = ()
    split_digits: bool = False
    threads: int = 16

    @property
    def symbols(self) -> list[str]:
        """The user-defined symbols, each once."""
        return list(dict.fromkeys((NEWLINE, *self.user_symbols)))

    def check(self) -> None:
        """Raise ``DataError`` for values that no text makes possible."""
        for symbol in self.symbols:
            if not symbol or " " in symbol or SPACE_MARK in symbol:
                raise DataError(f"--user-symbols {symbol!r}: expected characters without spaces or U+2581")
            if symbol in CONTROL_TOKENS or (self.byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", symbol)):
                raise DataError(f"--user-symbols {symbol}: expected others than the model's own tokens")
        # One character at least.
        fewest = len(CONTROL_TOKENS) + len(self.symbols) + _BYTES * self.byte_fallback + 1
        if self.vocab_size < fewest:
            kinds = "control tokens, symbols, bytes" if self.byte_fallback else "control tokens, symbols"
            raise DataError(f"--vocab-size {self.vocab_size}: expected at least {fewest}: {kinds} and a character")


class Sample:
    """Documents of ``budget`` bytes in all, each as likely as any other, of however many are added.

    Memory: the budget, the largest document, and about 60 bytes a document kept.  Copies of one text are equally likely
    all together, not each by itself.

    Args:
        budget: bytes of UTF-8.
        seed: another one, another sample.
    """

    def __init__(self, budget: int, seed: int = 0) -> None:
        self.budget = budget
        self._key = seed.to_bytes(8, "little")
        # Hash and text in one: half the memory of pairs.  The smallest hash is the first to go.
        self._heap: list[bytes] = []
        self._held = 0

    def add(self, encoded: bytes) -> None:
        """Offer a document, in UTF-8."""
        entry = blake2b(encoded, digest_size=_DIGEST_BYTES, key=self._key).digest() + encoded
        # What is held never falls below the budget again, so what is refused now could never come in.
        if self._held >= self.budget and entry <= self._heap[0]:
            return
        heapq.heappush(self._heap, entry)
        self._held += len(encoded)
        while self._held - (last := len(self._heap[0]) - _DIGEST_BYTES) >= self.budget:
            heapq.heappop(self._heap)
            self._held -= last

    def take(self) -> list[bytes]:
        """The documents, in an order that depends on them alone; of the last one, what the budget leaves.

        The sample is empty afterwards.
        """
        entries, surplus = sorted(self._heap), max(0, self._held - self.budget)
        self._heap, self._held, documents = [], 0, []
        while entries:  # One by one: the text is never there twice.
            documents.append(entries.pop()[_DIGEST_BYTES:])
        if surplus:
            whole = documents.pop()
            part = whole[: len(whole) - surplus].decode("utf-8", errors="ignore").encode()
            documents += [part] if part else []
        return documents


@dataclass
class Read:
    """What was read: documents, their bytes of UTF-8, those with U+2581, and faults by kind."""

    documents: int = 0
    text_bytes: int = 0
    marked: int = 0
    faults: Counter[str] = field(default_factory=Counter)


def read_sample(inputs: Inputs, sample: Sample, fatal: bool) -> Read:
    """Offer every document of ``inputs`` to ``sample``.

    Raises:
        DataError: for the first fault, with ``fatal``; or for a file that cannot be read.
    """
    read, mark = Read(), SPACE_MARK.encode()
    lines: Counter[int] = Counter()  # Of each source, before the block.
    with bar("reading", inputs.work, inputs.unit) as drawn:
        for block in inputs.blocks():
            for document in inputs.documents(block):
                if isinstance(document, Fault):
                    if fatal:
                        name, line = inputs.sources[block.source].name, lines[block.source] + document.line
                        raise DataError(fault_message(name, line, document))
                    read.faults[document.kind] += 1
                    continue
                sample.add(document.encoded)
                read.documents += 1
                read.text_bytes += len(document.encoded)
                read.marked += mark in document.encoded
            kind = inputs.sources[block.source].kind
            lines[block.source] += 1 if block.payload is None else count_lines(block.payload, kind)[0]
            drawn.set_postfix_str(f"{read.documents:,} documents", refresh=False)
            drawn.update(block.work)
    return read


def train_model(documents: Iterable[bytes], settings: ModelSettings) -> bytes:
    """The serialised model of ``documents`` (UTF-8): the same bytes for the same documents in the same order.

    Lines are what sentencepiece calls sentences, so that no token but the newline holds one.

    Raises:
        DataError: with one line, if sentencepiece cannot make it.
    """
    import sentencepiece

    settings.check()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(
                piece for document in documents for line in document.split(b"\n") if line for piece in _pieces(line)
            ),
            model_writer=model,
            model_type=settings.model_type,
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            byte_fallback=settings.byte_fallback,
            user_defined_symbols=settings.symbols,
            split_digits=settings.split_digits,
            normalization_rule_name=settings.normalization,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            shuffle_input_sentence=False,
            max_sentence_length=_SENTENCE_BYTES,
            # Recorded in the model, also where it makes no difference.
            num_threads=1 if settings.model_type == "bpe" else settings.threads,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            minloglevel=2,
        )
    except Exception as error:  # sentencepiece's, of several types.
        raise DataError(_refusal(settings, str(error))) from error
    return model.getvalue()


def _pieces(line: bytes) -> Iterator[bytes]:
    """A line, or a long one in parts, cut before spaces where it has some, and within no character."""
    start = 0
    while len(line) - start > _PIECE_BYTES:
        end = line.rfind(b" ", start + 1, start + _PIECE_BYTES)
        if end < 0:
            end = start + _PIECE_BYTES
            while line[end] & 0xC0 == 0x80:
                end -= 1
        yield line[start:end]
        start = end
    yield line[start:]


def _refusal(settings: ModelSettings, message: str) -> str:
    """What sentencepiece says, in the words of the flags."""
    size = f"--vocab-size {settings.vocab_size}: expected"
    if most := re.search(r"size too high.*<= (\d+)", message):
        return f"{size} at most {most[1]}: the sample has no more {settings.model_type} tokens"
    if least := re.search(r"required_chars.*vs (\d+)", message):
        return f"{size} at least {least[1]}, for the sample's characters, or a lower --character-coverage"
    if "sentences_.empty()" in message:
        return "expected text to train on: there is none in the sample"
    # Before the words: status, file, line and the condition in brackets.
    words = re.sub(r"^\w+: (\S+\(\d+\) )?(\[.*?\] )?", "", message).strip()
    return f"sentencepiece: {words.splitlines()[0] if words else message}"


def bytes_per_token(model: bytes, documents: list[bytes]) -> tuple[float, int]:
    """UTF-8 bytes that a token stands for on average, and on how many bytes of ``documents`` that was measured."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = measured = 0
    for document in documents:
        text = document if measured else document[:_MEASURED_BYTES]
        if measured + len(text) > _MEASURED_BYTES:
            break
        tokens += len(processor.encode(text.decode("utf-8", errors="ignore")))
        measured += len(text)
    return measured / max(tokens, 1), measured


@dataclass(frozen=True)
class Trained:
    """A finished model, and what it was made of; sizes are in bytes of UTF-8."""

    path: Path
    settings: ModelSettings
    read: Read
    sample_documents: int
    sample_bytes: int
    bytes_per_token: float
    measured_bytes: int

    @property
    def flags(self) -> str:
        """What tokenizing and pretraining take to use it, quoted for a shell."""
        return shlex.join(["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(self.path)])


def train_tokenizer(
    inputs: Inputs,
    output: Path,
    settings: ModelSettings,
    sample: Sample,
    fatal: bool = True,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Trained:
    """Read ``inputs``, train on ``sample`` of them, and write ``output``, which appears complete or not at all.

    Raises:
        DataError: with one line, for whatever is in the way; nothing was written then.
    """
    settings.check()
    _require_place(output, overwrite, inputs)
    read = read_sample(inputs, sample, fatal)
    if not read.documents:
        raise DataError("expected documents to train on: there is none in the input")
    documents = sample.take()
    size = sum(map(len, documents))
    say(f"training a {settings.model_type} model of {settings.vocab_size:,} tokens on {size / 1e6:,.1f} MB of text")
    model = _beside(lambda: train_model(documents, settings))
    measured = bytes_per_token(model, documents)
    _require_place(output, overwrite, inputs)
    with file_errors(f"--output {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, model, durable=True)
    return Trained(output, settings, read, len(documents), size, *measured)


def _require_place(output: Path, overwrite: bool, inputs: Inputs) -> None:
    """Raise ``DataError`` if the model could not be written, or would replace something that it must not."""
    if output.is_dir() or not output.name:
        raise DataError(f"--output {output}: expected a file, such as tokenizer.model")
    if os.path.lexists(output):
        if replaced_input(output, inputs.files()) is not None:
            raise DataError(f"--output {output}: expected another file than the input")
        if not overwrite:
            raise DataError(f"--output {output} exists: expected another name, or --overwrite")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise DataError(f"--output {output}: expected a folder that can be written to, {above} cannot")


def _beside(work: Callable[[], bytes]) -> bytes:
    """``work()`` in a thread, with its time shown.

    sentencepiece looks at no signals, and holds no lock of Python's: waited for like this, Control-C ends the process
    at once.
    """
    outcome: Future[bytes] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    with waiting_for("training", quick=True):
        while not wait([outcome], timeout=1).done:
            pass
    return outcome.result()
