"""The quickstart's driver, without processes: log reading, output directory, options."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from examples.quickstart import build_dataset, flags, launch, options, run, workdir
from examples.quickstart.training_log import Records, Result, Step, Validation, describe, stage, summarise


def step_line(iteration: int, total: int, ms: float, loss: str) -> str:
    """One progress line as Megatron 0.19.2 prints it; it leaves `loss` out when it is not a number."""
    return (
        f" [2025-01-02 03:04:05.600000] iteration {iteration:8d}/{total:8d} |"
        f" consumed samples: {16 * iteration:12d} | elapsed time per iteration (ms): {ms:.1f} |"
        f" learning rate: 3.000000E-04 | global batch size:    16 |{loss} loss scale: 1.0 |"
        " grad norm: 1.927 | number of skipped iterations:   0 |"
        " number of nan iterations:   0 |"
    )


LOG = f"""\
$ python -m torch.distributed.run ...
sla-megatron: parameters 2099200 (dense 2148352)
{step_line(1, 20, 3917.4, " lm loss: 8.331205E+00 |")}
{step_line(5, 20, 1200, " lm loss: 7.900000E+00 |")}
{step_line(10, 20, 400, " lm loss: 6.500000E+00 |")}
---------------------------------------------------------------------------------------------
 validation loss at iteration 10 | lm loss value: 6.400000E+00 | lm loss PPL: 6.018450E+02 |
---------------------------------------------------------------------------------------------
{step_line(15, 20, 600, "")}
{step_line(20, 20, 500, " lm loss: 5.000000E+00 |")}
  successfully saved checkpoint from iteration      20 to out/sla/checkpoints [ t 1/2, p 1/1 ]
 validation loss at iteration 20 on validation set | lm loss value: 5.250000E+00 | lm loss PPL: 1.905663E+02 |
"""


def read_log(text: str) -> Records:
    records = Records()
    for line in text.splitlines():
        records.read(line)
    return records


def result(**changes: float) -> Result:
    values = {"iteration": 20, "parameters": 1000, "train_loss": 4.0, "validation_loss": 5.0}
    return Result(**{**values, "tokens_per_second": 200.0, **changes})


# Reading the log


def test_log_of_one_launch() -> None:
    records = read_log(LOG)
    assert records.parameters == 2_099_200
    assert [step.iteration for step in records.steps] == [1, 5, 10, 15, 20]
    assert records.steps[2] == Step(10, 20, 6.5, 400.0, warm=True)
    assert [step.warm for step in records.steps] == [False, False, True, True, True]
    assert numpy.isnan(records.steps[3].loss)  # Megatron printed no loss
    assert records.validations == [Validation(10, 6.4), Validation(20, 5.25)]


def test_summary_of_one_launch() -> None:
    summary = summarise(read_log(LOG), tokens_per_iteration=2048)
    assert summary == Result(20, 2_099_200, 5.0, 5.25, 2048 / 0.5)


def test_summary_over_several_launches() -> None:
    """A resumed run goes on from its log: its own first lines are cold again."""
    resumed = read_log(LOG + LOG.replace("/      20 ", "/      40 ").replace("): 500.0", "): 200.0"))
    assert [step.warm for step in resumed.steps] == [False, False, True, True, True] * 2
    assert summarise(resumed, 2048).tokens_per_second == 2048 / 0.45  # median of 400 600 500, 400 600 200


def test_summary_of_a_launch_without_warm_lines() -> None:
    warm = [step_line(10, 20, 400, " lm loss: 6.500000E+00 |"), step_line(15, 20, 600, "")]
    cold = read_log("\n".join(line for line in LOG.splitlines() if line not in (*warm, LOG.splitlines()[2])))
    assert [step.iteration for step in cold.steps] == [5, 20]
    assert summarise(cold, 2048).tokens_per_second == 2048 / 0.5


def test_parameters_of_the_dense_run() -> None:
    assert read_log("sla-megatron: off; parameters 2148352").parameters == 2_148_352


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("sla-megatron: parameters", "the number of parameters"),
        ("elapsed time", "a progress line"),
        ("validation loss", "a validation loss"),
    ],
)
def test_summary_names_what_is_missing(gone: str, missing: str) -> None:
    rest = "\n".join(line for line in LOG.splitlines() if gone not in line)
    with pytest.raises(ValueError, match=f"^the log lacks {missing}$"):
        summarise(read_log(rest), 2048)


def test_terminal_lines() -> None:
    assert describe(Step(10, 200, 6.5, 412.6, True)) == "    10/200    loss 6.5000   413 ms/iteration"
    assert describe(Validation(10, 6.4)) == "    10        validation loss 6.4000"


@pytest.mark.parametrize(
    ("line", "doing"),
    [
        ("using world size: 2, data-parallel size: 1, context-parallel size: 1,", "meeting the other processes"),
        ("sla-megatron: off; parameters 2110720", "setting up data and optimizer"),
        ("[before the start of training step] datetime: 2026-11-27 12:53:50.871115 ", "training"),
        (step_line(5, 20, 1200, " lm loss: 7.900000E+00 |"), "training"),
        ("Evaluating on 160 samples", "measuring the loss on held-out text"),
        (
            "[2026-11-27 12:54:27.0] saving checkpoint at iteration      20 to out",
            "writing a checkpoint",
        ),
        ("Evaluating iter 1/10", None),
    ],
    ids=lambda value: value and "_".join(value.split()[:2]).strip("[]"),
)
def test_what_training_does_next(line: str, doing: str | None) -> None:
    assert stage(line) == doing


def test_failure_tail_is_the_cause() -> None:
    text = (
        "$ first launch\nearlier trouble\n$ second launch\nValueError: the cause\n"
        "E0102 03:04:05.6 7 lib/torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)\n"
        "ChildFailedError\n"
    )
    assert launch.failure_tail(text) == "$ second launch\nValueError: the cause"
    assert launch.failure_tail("") == ""


# Output directory


def test_new_directory_has_no_settings(tmp_path: Path) -> None:
    assert workdir.read_settings(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    with workdir.locked(tmp_path / "out"):
        workdir.write_json(tmp_path / "out" / workdir.SETTINGS, {"tp": 2, "text": "code", "vocab_size": 4096})
    workdir.check_settings(tmp_path / "out", {"tp": 2, "text": "code", "vocab_size": 4096})
    with pytest.raises(workdir.WorkdirError, match="^--vocab-size 512: expected 4096, which"):
        workdir.check_settings(tmp_path / "out", {"tp": 2, "text": "code", "vocab_size": 512})


def test_a_directory_of_before_texts_had_names(tmp_path: Path) -> None:
    """It has code, and goes on with code alone."""
    workdir.write_json(tmp_path / workdir.SETTINGS, {"tp": 2})
    workdir.check_settings(tmp_path, {"tp": 2, "text": "code"})
    with pytest.raises(workdir.WorkdirError, match="^--text prose: expected code, which"):
        workdir.check_settings(tmp_path, {"tp": 2, "text": "prose"})


def test_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("keep")
    for use in (workdir.read_settings, workdir.clear):
        with pytest.raises(workdir.WorkdirError, match="^--out .*: expected an empty or new directory"):
            use(tmp_path)
    with pytest.raises(workdir.WorkdirError, match="expected a directory$"):
        workdir.read_settings(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "keep"


def test_clear_removes_only_its_own(tmp_path: Path) -> None:
    workdir.write_json(tmp_path / workdir.SETTINGS, {})
    (tmp_path / "dense" / "checkpoints").mkdir(parents=True)
    (tmp_path / "dense.log").write_text("log")
    (tmp_path / "notes.txt").write_text("keep")
    workdir.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_directory_in_use(tmp_path: Path) -> None:
    with workdir.locked(tmp_path), pytest.raises(workdir.WorkdirError, match="another quickstart is running"):
        with workdir.locked(tmp_path):
            pass
    with workdir.locked(tmp_path):
        pass


def test_results_round_trip(tmp_path: Path) -> None:
    assert workdir.load_result(tmp_path, "sla") is None
    (tmp_path / "sla").mkdir()
    workdir.write_json(tmp_path / "sla" / "result.json", result().as_dict())
    assert workdir.load_result(tmp_path, "sla") == result()


# Options


BAD_OPTIONS = [
    (["--train-iters", "0"], "--train-iters 0: expected an integer from 1"),
    (["--train-iters", "x"], "--train-iters x: expected an integer"),
    (["--eval-iters", "0"], "--eval-iters 0: expected an integer from 1"),
    (["--corpus-mb", "0.1"], "--corpus-mb 0.1: expected a number from 1 to 1000"),
    (["--corpus-mb", "nan"], "--corpus-mb nan: expected a number from 1 to 1000"),
    (["--vocab-size", "100"], "--vocab-size 100: expected an integer from 512 to 32000"),
    (["--text", "verse"], "--text verse: expected one of code, prose"),
    (["--tp", "3"], "--tp 3: expected 1, 2, 4 or 8"),
    (["--sla-skip-distance", "0"], "--sla-skip-distance 0: expected one or more integers >= 1"),
    (["--sla-source-layer", "9"], "--sla-source-layer 9: expected one or more layers within 1-8"),
    (["--sla-source-layer", "1", "--sla-skip-distance", "1"], "--sla-source-layer 1: expected no --sla-skip-distance"),
    (["--sla-share", "queries"], "--sla-share queries: expected one of kv, values, keys"),
    (["--sla-num-skip-groups", "9"], "--sla-num-skip-groups 9: expected an integer from 0 to 8"),
    (["--sla-layers", "3-9"], "--sla-layers 3-9: expected layers within 1-8"),
    (["--sla-kv-projection", "half"], "--sla-kv-projection half: expected one of full, pruned"),
    (["--tp", "4", "--sla-kv-projection", "pruned"], "--sla-kv-projection pruned: expected full"),
    (["--no-such-flag"], "--no-such-flag: expected a known flag"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_OPTIONS, ids=lambda value: "_".join(value).strip("-"))
def test_bad_options_end_with_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    try:
        code = run.main(["--out", str(out), "--device", "cpu", *argv])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert code not in (0, None)
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
    assert not out.exists()


def test_megatron_flags_follow_a_double_dash() -> None:
    args = options.parse_args(["--sla-skip-distance", "3", "6", "--", "--bf16", "--lr", "1e-3"])
    assert args.megatron == ["--bf16", "--lr", "1e-3"]
    assert options.sla_flags(args) == ["--sla", "--sla-skip-distance", "3", "6"]
    args = options.parse_args(["--sla-share", "values", "--sla-source-layer", "1"])
    assert options.sla_flags(args) == ["--sla", "--sla-source-layer", "1", "--sla-share", "values"]
    options.check_sla(args, 2)


def test_both_runs_have_the_same_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same shape, seed, data and order: the runs differ in where they save and in --sla."""
    launched: dict[str, list[str]] = {}

    def train(name: str, ranks: int, argv: list[str], log: Path) -> Records:
        launched[name] = argv
        return read_log(LOG)

    monkeypatch.setattr(launch, "train", train)
    args = options.parse_args(["--out", str(tmp_path), "--device", "cpu", "--train-iters", "20"])
    dataset = build_dataset.Dataset(tmp_path / "data", 10, 1000, 512)
    for model in workdir.MODELS:
        run.train_one(model, args, 2, dataset)
    dense, sla = launched["dense"], launched["sla"]
    assert [flag.replace("/sla/", "/dense/") for flag in sla] == [*dense, "--sla"]
    assert dense[dense.index("--tensor-model-parallel-size") + 1] == "2"
    assert flags.TOKENS_PER_ITERATION == 128 * 16
    # Transformer Engine is no part of .venv, on a GPU neither.
    assert dense[dense.index("--transformer-impl") + 1] == "local"


def test_finished_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--out", str(tmp_path), "--device", "cpu", "--train-iters", "20"]
    args = options.parse_args(argv)
    workdir.write_json(tmp_path / workdir.SETTINGS, options.settings(args, 2))
    for model in workdir.MODELS:
        (tmp_path / model).mkdir()
        workdir.write_json(tmp_path / model / "result.json", result().as_dict())
    monkeypatch.setattr(build_dataset, "build", lambda *_: pytest.fail("must not build anything"))
    assert run.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "holds a finished run of 20 iterations" in printed
    assert json.loads((tmp_path / "dense" / "result.json").read_text()) == result().as_dict()
