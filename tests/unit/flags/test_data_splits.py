"""Which documents each part of a data set gets, against Megatron's own classes; a part that gets none is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.common.splits import DEFAULT_SPLIT, PARTS, split_hint, split_ranges, without_empty_parts
from tests.support.indexed_files import write_indexed

from .flag_tables import MODEL

pytestmark = pytest.mark.filterwarnings("ignore")

SHARES = st.one_of(st.integers(0, 1000).map(str), st.sampled_from(["0.1", ".5", "0.333", "99.9", "1e"]))
SPLITS = st.lists(SHARES, min_size=1, max_size=3).map(",".join)


def upstreams(split: str, sequences: int) -> dict[str, tuple[int, int]]:
    """What ``BlendedMegatronDatasetBuilder`` hands each part's data set, by upstream's own two functions."""
    from megatron.core.datasets import blended_megatron_dataset_config as config

    matrix = config.convert_split_vector_to_split_matrix(config.parse_and_normalize_split(split))
    bounds = {}
    for part, share in zip(PARTS, matrix, strict=True):
        if share is not None:
            indices = numpy.arange(round(share[0] * float(sequences)), round(share[1] * float(sequences)))
            bounds[part] = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)
    return bounds


@given(SPLITS, st.integers(0, 5000))
def test_as_upstream_divides(megatron_imported: None, split: str, sequences: int) -> None:
    """Any shares, with the bounds rounded as upstream rounds them; a share of 0 is not built."""
    try:
        ranges = split_ranges(split, sequences)
    except ValueError:
        assert not any(float(share.rstrip("e")) for share in split.split(","))
        return
    assert {part: (each.start, each.stop) if each else (0, 0) for part, each in ranges.items()} == upstreams(
        split, sequences
    )


@pytest.mark.parametrize("split", ["", "abc", "0", "0,0,0", "1,1,1,1"])
def test_what_is_no_split(split: str) -> None:
    with pytest.raises(ValueError, match="up to three shares"):
        split_ranges(split, 100)


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        (10, "too few documents, 10, for Megatron's default --split 969,30,1: valid and test would get none"),
        (40, "too few documents, 40, for Megatron's default --split 969,30,1: test would get none"),
        (2, "Train with --split 1,0,0, and --eval-iters 0"),
        (1000, None),
        (0, None),
    ],
)
def test_the_hint(sequences: int, expected: str | None) -> None:
    hint = split_hint(sequences)
    assert hint is None if expected is None else expected in hint


@given(st.integers(1, 3000))
def test_what_is_proposed_does(sequences: int) -> None:
    """Each part that is built has a document; and there is a hint exactly where Megatron's default has none."""
    assert all(split_ranges(without_empty_parts(sequences), sequences).values())
    assert (split_hint(sequences) is None) == all(split_ranges(DEFAULT_SPLIT, sequences).values())


#: Flags -> what training and the doctor say of them; ``""``: nothing.  Documents are in the names: d40 has 40.
DATA: dict[str, str] = {
    "--data-path d40": "--split 969,30,1: expected tokens in each part: test gets none of the 40 documents of d40 "
    "(--split 38,1,1 would do; a share of 0 is not built)",
    "--data-path d10": "--split 969,30,1: expected tokens in each part: valid gets none of the 10 documents of d10",
    # Upstream builds what nobody will read.
    "--data-path d40 --eval-iters 0": "--split 969,30,1: expected tokens in each part: test gets none of the 40",
    "--data-path d40 --skip-train": "--split 969,30,1: expected tokens in each part: test gets none of the 40",
    "--data-path d40 --data-cache-path elsewhere": "--split 969,30,1: expected tokens in each part: test gets none of",
    "--data-path d40 --split 38,1,1": "",
    "--data-path d40 --split 9,1,0": "",
    "--data-path d2000 --split 99,1": "",
    "--data-path d40 --split 99,1": "--split 99,1: expected tokens in each part: valid gets none of the 40 documents",
    "--data-path d1 --split 1,0,0 --eval-iters 0": "",
    "--data-path d1 --split 1,1,0": "--split 1,1,0: expected tokens in each part: train gets none of the 1 documents",
    "--data-path d2000": "",
    # Blends: with weights and without, one that is large does not help one that is small.
    "--data-path 1 d2000 1 d40": "--split 969,30,1: expected tokens in each part: test gets none of the 40",
    "--data-path d2000 d40": "--split 969,30,1: expected 17 tokens or more, a whole sequence, in each part: test gets",
    "--data-path 1 d2000 1 d40 --split 8,1,1": "",
    "--data-args-path blend": "--split without a value: expected up to three shares, such as 969,30,1",
    "--data-args-path blend --split 969,30,1": "--split 969,30,1: expected tokens in each part: test gets none of the",
    # Documents without a token are none.
    "--data-path half": "--split 969,30,1: expected tokens in each part: valid gets none of the 2000 documents",
    "--data-path d0": "--data-path d0: expected data with tokens: its .bin is empty",
    "--data-path nosuch": "--data-path nosuch: expected PREFIX.bin and PREFIX.idx of the data",
    # What is read once needs a sequence of 16 tokens, and its last label.
    "--data-path d2000 short --split 8,1,1": "--split 8,1,1: expected 17 tokens or more, a whole sequence, in each "
    "part: valid gets 8 of the 40 documents of short",
    "--data-path 1 d2000 1 short --split 8,1,1": "",
    "--data-path short --split 9,1,0 --full-validation --multiple-validation-sets": "--split 9,1,0: expected 17",
    "--train-data-path d2000 --valid-data-path four --full-validation --multiple-validation-sets": "--valid-data-path "
    "four: expected 17 tokens or more, a whole sequence: its 2 documents have 4",
    "--train-data-path d2000 --valid-data-path four": "",
    # A set for each part.
    "--train-data-path d2000 --valid-data-path d1": "",
    "--train-data-path d2000 --valid-data-path d1 --test-data-path d1": "",
    "--train-data-path d2000 --valid-data-path d0": "--valid-data-path d0: expected data with tokens: its .bin is",
    "--train-data-path d2000 --valid-data-path d1 --test-data-path 1 d1 1 nosuch": "--test-data-path nosuch: expected",
    "--per-split-data-args-path per-split": "--per-split-data-args-path d0: expected data with tokens: its .bin is",
    "--train-data-path d2000": "--eval-iters 100: expected data to validate on, or --eval-iters 0",
    "--train-data-path d2000 --eval-iters 0": "",
    "--data-path d2000 --split 1,0,0": "--eval-iters 100: expected data to validate on, or --eval-iters 0",
    "--data-path d2000 --split 0,1,1": "--split 0,1,1: expected a share of the data for training, the first one",
    "--valid-data-path d2000": "no data to train on: expected --train-data-path, or --skip-train",
    "--data-path d2000 --split abc": "--split abc: expected up to three shares, such as 969,30,1",
    "--data-path d2000 --split 1,1,1,1": "--split 1,1,1,1: expected up to three shares, such as 969,30,1",
    # Megatron evaluates whole sets where there is no test set beside them.
    "--train-data-path d2000 --valid-data-path d40 d1 --full-validation --multiple-validation-sets": "",
    "--data-path d2000 --full-validation --multiple-validation-sets": "--full-validation True: expected no test data",
    "--data-path d2000 --split 9,1,0 --full-validation --multiple-validation-sets": "",
    "--mock-data --full-validation --multiple-validation-sets": "--full-validation True: expected no test data beside",
    "--mock-data": "",
    "": "no data: expected --data-path, --train-data-path, --valid-data-path, --test-data-path or --mock-data",
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for documents in (0, 1, 10, 40, 2000):
        write_indexed(folder / f"d{documents}", documents)
    # As if the last 100 documents, and with them two parts, had nothing in them.
    write_indexed(folder / "half", 2000)
    with (folder / "half.idx").open("r+b") as idx:
        idx.seek(34 + 4 * 1900)
        idx.write(bytes(4 * 100))
    write_indexed(folder / "short", 40, length=2)
    write_indexed(folder / "four", 2, length=2)
    (folder / "blend").write_text("1 d2000 3 d40")
    (folder / "per-split").write_text(json.dumps({"train": ["d2000"], "valid": "1 d1 1 d0", "test": ["d1"]}))
    return folder


@pytest.mark.parametrize("flags", DATA)
def test_parts_without_tokens(
    megatron: None, corpora: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: str
) -> None:
    """Training and the doctor say the same line; nothing is written."""
    from sla_megatron.commands.doctor.data_files import data_files
    from sla_megatron.commands.doctor.finding import Fault, Skipped
    from sla_megatron.flags import arguments
    from sla_megatron.flags.entry_point import require_data_and_folders, require_pretraining

    monkeypatch.chdir(corpora)
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = {path: path.stat().st_mtime_ns for path in corpora.rglob("*")}
    written: list[object] = []
    monkeypatch.setattr(arguments, "set_global_variables", written.append)
    model = MODEL.replace("--mock-data", "").replace("--data-cache-path cache", "")
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *model.split(), "--eval-interval", "1", *flags.split()])
    said = ""
    try:
        arguments.parse_and_validate_args(check=require_pretraining, check_validated=require_data_and_folders)
    except SystemExit as ended:
        assert (ended.code, written) == (2, [])
        (said,) = capsys.readouterr().err.splitlines()
    said = said.removeprefix("sla-megatron: error: ")
    assert said.startswith(DATA[flags]) if DATA[flags] else not said
    args = arguments.settled_args(check=require_pretraining, silent=True)
    try:
        data_files(args, None)
    except Fault as fault:
        # What it examines besides, each file by itself, it says first.
        assert str(fault) == said or any(each in str(fault) for each in ("d0.idx", "nosuch.idx", "half.bin", "no data"))
        assert said
    except Skipped:
        assert "--mock-data" in flags
    else:
        assert not said
    assert {path: path.stat().st_mtime_ns for path in corpora.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--save file/checkpoints", "--save file/checkpoints: expected a folder that can be made there"),
        ("--tensorboard-dir file", "--tensorboard-dir file: expected a folder that can be made there"),
        ("--lr 1e-3", "--eval-interval without a value: expected an integer >= 1"),
    ],
)
def test_what_a_run_needs_to_start(
    megatron: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, line: str
) -> None:
    """Seen before hours of training, at whose end there would be nowhere to save."""
    from sla_megatron.common.errors import FlagError
    from sla_megatron.flags.arguments import settled_args
    from sla_megatron.flags.entry_point import require_data_and_folders

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    args = settled_args(argv=[*MODEL.split(), *flags.split()], silent=True)
    with pytest.raises(FlagError) as error:
        require_data_and_folders(args)
    assert error.value.reason == line


def test_a_part_that_is_refused_would_never_be_built(
    megatron: None, corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's own data set of no documents: it counts epochs of nothing, and is stopped here after some of them."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    class Endless(Exception):
        pass

    class Counter(int):
        """Tokens of an epoch, 0, which may be added up ten times."""

        added = 0

        def __radd__(self, other: int) -> int:
            Counter.added += 1
            if Counter.added > 10:
                raise Endless
            return other

    dataset = object.__new__(GPTDataset)
    dataset.num_samples = 0
    dataset.config = type("Config", (), {"sequence_length": 16, "add_extra_token_to_sequence": 1})
    with pytest.raises(Endless):
        dataset._get_num_epochs(Counter(0))
