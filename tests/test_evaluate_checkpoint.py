"""``sla-eval``: lm-eval on Megatron checkpoints as they are, against lm-eval's own ``hf`` on their exports."""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.convert_models import save_random_checkpoint
from tests.support.evaluation import (
    PAIRS,
    QUESTIONS,
    block,
    generated,
    log_likelihoods,
    requests,
    save_tokenizer,
    scores,
)
from tests.support.launch import free_ports, run_worker

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 32
BASE = {"seq_length": LENGTH, "max_position_embeddings": LENGTH}
ROPE = {"position_embedding_type": "rope", "swiglu": True, "disable_bias_linear": True, "normalization": "RMSNorm"}
SKIPPING = {"sla": True, "sla_skip_distance": [1, 2], "sla_num_skip_groups": 2}
#: Checkpoints that have an export, without the layers that predict further tokens.
MODELS: dict[str, dict[str, Any]] = {
    "checkpoints": SKIPPING,
    "pruned": ROPE | {"sla": True, "sla_skip_distance": [1], "sla_kv_projection": "pruned"},
    "values": ROPE | {"sla": True, "sla_source_layer": [1], "sla_share": "values", "sla_kv_projection": "pruned"},
    "dense": ROPE | {"untie_embeddings_and_output_weights": True, "mtp_num_layers": 1},
    "hybrid": SKIPPING | {"num_layers": 8, "hybrid_layer_pattern": "*-*-*-*-"},
}
#: No export has experts.
EXPERTS = ROPE | {"sla": True, "sla_skip_distance": [1], "num_experts": 4, "moe_router_load_balancing_type": "none"}
#: Of a log-likelihood, relative: rounding of fp32, in sums of another order.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of ``MODELS``, and a tokenizer; ``tasks``: the README's."""
    path = tmp_path_factory.mktemp("evaluate")
    save_tokenizer(path / "tokenizer")
    for name, flags in (MODELS | {"experts": EXPERTS}).items():
        save(path, name, flags)
    tasks = path / "tasks"
    tasks.mkdir()
    (tasks / "my_choices.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tasks / "my_choices.yaml").write_text(block("task: my_choices"))
    return path


def save(folder: Path, name: str, flags: dict[str, Any], **stored: Any) -> None:
    """A checkpoint of the folder's tokenizer."""
    own = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder / "tokenizer")}
    save_random_checkpoint(folder / name, BASE | flags, stored=own | stored)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A model's process groups end with it, before the next test."""
    yield
    if dist.is_initialized():
        gc.collect()
    assert not dist.is_initialized()


def checkpoint_model(folder: Path, **arguments: Any) -> Any:
    from sla_megatron.commands.evaluate.megatron_lm import SLAMegatronLM

    return SLAMegatronLM(**{"pretrained": str(folder), "batch_size": 3, **arguments})


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_scored_as_its_export(folder: Path, tmp_path: Path, name: str) -> None:
    """Its log-likelihoods are those that lm-eval's own class finds for the export, and it writes the same words."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from sla_megatron.commands.convert.commands import megatron_to_hf, open_megatron

    megatron_to_hf(open_megatron(folder / name, drop_mtp=True), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    hf = HFLM(exported, tokenizer=PreTrainedTokenizerFast.from_pretrained(tmp_path / "exported"), batch_size=3)
    ours = checkpoint_model(folder / name)
    assert log_likelihoods(ours) == pytest.approx(log_likelihoods(hf), rel=CLOSE)
    assert generated(ours) == generated(hf)
    assert (ours.max_length, ours.prefix_token_id) == (hf.max_length, hf.prefix_token_id)
    ours.close()


def test_a_plain_gpt_of_the_same_weights_is_told_apart(folder: Path, tmp_path: Path) -> None:
    """What lm-eval's ``megatron_lm`` would build: Megatron's own GPT, filled without an error."""
    save_tokenizer(tmp_path / "tokenizer")
    save(tmp_path, "plain", SKIPPING, sla=False)
    ours = checkpoint_model(folder / "checkpoints")
    expected = log_likelihoods(ours)
    ours.close()
    plain = checkpoint_model(tmp_path / "plain")
    found = log_likelihoods(plain)
    plain.close()
    differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    assert min(differences) > 100 * CLOSE


def test_the_documented_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes what the model finds, and how often the best choice is the right one."""
    from sla_megatron.commands.evaluate import cli

    words = shlex.split(block("HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 sla-eval").replace("\\\n", ""))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", words[words.index("sla-eval") :])
    cli.main()
    gc.collect()
    (samples,) = folder.glob("results/checkpoints/samples_my_choices_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    expected = choices(folder / "checkpoints")
    assert scores(lines) == {question: pytest.approx(each, rel=CLOSE) for question, each in expected.items()}
    for line in lines:
        found = expected[line["doc"]["question"]]
        assert line["acc"] == float(found.index(max(found)) == line["doc"]["answer"])


@pytest.mark.distributed
def test_over_two_ranks(folder: Path, tmp_path: Path) -> None:
    """Whatever they share: what one rank finds, and lm-eval's results are one rank's to write."""
    models = {
        "tensor": {"pretrained": "checkpoints", "tensor_model_parallel_size": 2},
        "copies": {"load": "checkpoints", "devices": 2},
        "pipeline": {"pretrained": "checkpoints", "pipeline_model_parallel_size": 2},
        "hybrid": {"pretrained": "hybrid", "pipeline_model_parallel_size": 2},
        "experts": {"pretrained": "experts", "expert_model_parallel_size": 2},
    }
    request = {"folder": folder, "models": models, "ports": free_ports(len(models))}
    request["tasks"] = {"tensor": "my_choices", "copies": "my_choices"}
    first, second = run_worker("evaluate_worker", request, 2, tmp_path / "ranks")

    expected = choices(folder / "checkpoints")
    for name in request["tasks"]:
        assert first[name] == {question: pytest.approx(each, rel=CLOSE) for question, each in expected.items()}, name
        assert second[name] is None
    for name in models.keys() - request["tasks"].keys():
        alone = checkpoint_model(folder / models[name]["pretrained"])
        expected, written = log_likelihoods(alone), generated(alone)
        alone.close()
        for answer in (first, second):
            assert answer[name] == [pytest.approx(expected, rel=CLOSE), written], name


def choices(checkpoint: Path) -> dict[str, list[float]]:
    """Each question's log-likelihoods of its choices, by one rank."""
    model = checkpoint_model(checkpoint)
    asked = [(question["question"], " " + choice) for question in QUESTIONS for choice in question["choices"]]
    found = iter(model.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True))
    model.close()
    return {question["question"]: [next(found)[0] for _ in question["choices"]] for question in QUESTIONS}


@pytest.mark.parametrize("name", ["pruned", "values"])
def test_rows_that_ranks_cannot_divide(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of four groups NSSS, of which the last layer has one pair of its own, or every layer behind the first a value."""
    import torch

    from sla_megatron.commands.convert.checkpoint_arguments import stored_args
    from sla_megatron.commands.evaluate.arguments import Sizes
    from sla_megatron.commands.evaluate.checkpoint_model import _args
    from sla_megatron.common.errors import FlagError

    monkeypatch.setenv("WORLD_SIZE", "2")
    iteration = folder / name / "iter_0000007"
    message = {
        "pruned": "live K/V groups .*: layer 4 has 1, 1.0 on the 2",
        "values": "live values .*: layer 2 has 1, 1.0",
    }
    with pytest.raises(FlagError, match=f"--sla-kv-projection pruned: expected full, or {message[name]}"):
        _args(stored_args(iteration), iteration, "cpu", Sizes(tensor=2), torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": None}, "model_args: expected a checkpoint's folder, pretrained=PATH"),
        ({"load": "also"}, "model_args: expected a checkpoint's folder, pretrained=PATH"),
        ({"pretrained": "nowhere"}, "nowhere: no such checkpoint folder"),
        ({"ckpt_step": 3}, "iter_0000003: no such checkpoint folder"),
        ({"ckpt_step": "last"}, "ckpt_step=last: expected an iteration"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size=2, pipeline_model_parallel_size=1: expected"),
        ({"pipeline_model_parallel_size": "two"}, "pipeline_model_parallel_size=two: expected an integer from 1"),
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size=2: expected a divisor of the 1 copies"),
        ({"devices": 4}, "devices=4: expected 1, the ranks of this job"),
        ({"max_gen_toks": "many"}, "max_gen_toks=many: expected an integer from 1"),
        ({"dtype": "int8"}, "dtype=int8: expected auto or one of fp32"),
        ({"device": "tpu"}, "--device tpu: expected one of auto, cpu, cuda"),
        ({"max_length": LENGTH + 1}, f"max_length=33: expected at most {LENGTH}"),
        ({"seq_length": 16}, "model_args seq_length: sla_megatron has no such argument"),
        ({"tokenizer": "./nowhere"}, "tokenizer=./nowhere: no such folder"),
        ({"tokenizer_model": "/nowhere"}, "tokenizer model /nowhere of the checkpoint is not there"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    """Before a model is built, and so that another can be."""
    from sla_megatron.common.errors import StartError

    with pytest.raises(StartError) as raised:
        checkpoint_model(folder / "checkpoints", **changes)
    assert message in raised.value.reason and "\n" not in raised.value.reason


def test_texts_of_another_tokenizer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NullTokenizer has none of its own; one with more tokens than the model is refused."""
    from sla_megatron.common.errors import StartError

    # As sla-plan leaves it in a process that calls it: no job, which has WORLD_SIZE too.
    monkeypatch.setenv("RANK", "0")
    save_random_checkpoint(tmp_path / "ids", BASE | SKIPPING)
    save_random_checkpoint(tmp_path / "small", BASE | SKIPPING | {"vocab_size": 40})
    with pytest.raises(StartError, match="its NullTokenizer has no texts: expected tokenizer=PATH"):
        checkpoint_model(tmp_path / "ids")
    with pytest.raises(StartError, match="it has a token 8., the model's are below 4"):
        checkpoint_model(tmp_path / "small", tokenizer=str(folder / "tokenizer"))
    given = checkpoint_model(tmp_path / "ids", tokenizer=str(folder / "tokenizer"))
    # The same weights, but for the vocabulary's padding.
    found = log_likelihoods(given)
    given.close()
    assert len(found) == len(PAIRS) + 3


def test_the_command_ends_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, and nothing is written."""
    from sla_megatron.commands.evaluate import cli

    monkeypatch.chdir(folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = "--model sla_megatron --model_args load=checkpoints --tasks my_choices --output_path refused"
    monkeypatch.setattr("sys.argv", ["sla-eval", *words.split(), "--use_cache", "kept"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sla-eval: error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and "--use_cache: expected one process" in lines[0]
    assert not (folder / "refused").exists() and not (folder / "kept").exists()
