"""``sla-eval``: lm-eval on Megatron checkpoints as they are, against lm-eval's own ``hf`` on their exports."""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.convert_models import save_random_checkpoint
from tests.support.evaluation import QUESTIONS, TEXT, block, save_tokenizer
from tests.support.launch import free_ports, run_worker

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 32
BASE = {"seq_length": LENGTH, "max_position_embeddings": LENGTH}
ROPE = {"position_embedding_type": "rope", "swiglu": True, "disable_bias_linear": True, "normalization": "RMSNorm"}
SKIPPING = {"sla": True, "sla_skip_distance": [1, 2], "sla_num_skip_groups": 2}
#: Checkpoints that have an export.
MODELS: dict[str, dict[str, Any]] = {
    "checkpoints": SKIPPING,
    "pruned": ROPE | {"sla": True, "sla_skip_distance": [1], "sla_kv_projection": "pruned"},
    "dense": ROPE | {"untie_embeddings_and_output_weights": True},
    "hybrid": SKIPPING | {"num_layers": 8, "hybrid_layer_pattern": "*-*-*-*-"},
}
#: No export has experts.
EXPERTS = ROPE | {"sla": True, "sla_skip_distance": [1], "num_experts": 4, "moe_router_load_balancing_type": "none"}
#: Of a log-likelihood, relative: rounding of fp32, in sums of another order.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of ``MODELS``, its export, a tokenizer, and tasks: the README's, one of whole texts, one of generation."""
    path = tmp_path_factory.mktemp("evaluate")
    save_tokenizer(path / "tokenizer")
    for name, flags in (MODELS | {"experts": EXPERTS}).items():
        save(path, name, flags)
    tasks = path / "tasks"
    tasks.mkdir()
    (tasks / "my_choices.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tasks / "my_choices.yaml").write_text(block("task: my_choices"))
    readme = yaml.safe_load(block("task: my_choices"))
    for task, changes in {
        "my_texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}} {{choices[0]}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "my_words": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
    }.items():
        kept = {name: value for name, value in readme.items() if name != "doc_to_choice"}
        (tasks / f"{task}.yaml").write_text(yaml.safe_dump(kept | changes | {"task": task}))
    return path


def save(folder: Path, name: str, flags: dict[str, Any], **stored: Any) -> None:
    """A checkpoint of the folder's tokenizer."""
    own = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder / "tokenizer")}
    save_random_checkpoint(folder / name, BASE | flags, stored=own | stored)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A model's process groups end with it, before the next test."""
    yield
    gc.collect()


def checkpoint_model(folder: Path, **arguments: Any) -> Any:
    from sla_megatron.commands.evaluate.megatron_lm import SLAMegatronLM

    return SLAMegatronLM(**{"pretrained": str(folder), "batch_size": 3, **arguments})


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


#: Empty contexts, contexts beyond the window, and continuations of one token that share a context.
PAIRS = [(q["question"], " " + choice) for q in QUESTIONS for choice in q["choices"]]
PAIRS += [("", "old mats"), (TEXT[:300], " met him"), ("the clocks", " w"), ("the clocks", " o")]


def log_likelihoods(model: Any) -> list[float]:
    """Of pairs, and of texts, one of which is several windows long."""
    pairs = model.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    texts = requests("loglikelihood_rolling", (TEXT[:400],), ("on the stairs",), ("a",))
    return [value for value, _ in pairs] + model.loglikelihood_rolling(texts, disable_tqdm=True)


def generated(model: Any) -> list[str]:
    """Greedy, of contexts of different lengths in a batch, one cut, with stop words; and drawn."""
    import torch

    greedy = {"until": ["k", "."], "max_gen_toks": 10}
    drawn = {"until": ["zz"], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0}
    torch.manual_seed(5)
    contexts = [
        ("on", greedy),
        ("It was a bright cold", greedy),
        (TEXT[:300], greedy),
        ("the", drawn),
        ("a day", drawn),
    ]
    return model.generate_until(requests("generate_until", *contexts), disable_tqdm=True)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_scored_as_its_export(folder: Path, tmp_path: Path, name: str) -> None:
    """Its log-likelihoods are those that lm-eval's own class finds for the export, and it writes the same words."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from sla_megatron.commands.convert.commands import megatron_to_hf, open_megatron
    from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

    megatron_to_hf(open_megatron(folder / name), tmp_path / "exported")
    exported = SlaGPTForCausalLM.from_pretrained(tmp_path / "exported").eval()
    hf = HFLM(exported, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "exported"), batch_size=3)
    ours = checkpoint_model(folder / name)
    assert log_likelihoods(ours) == pytest.approx(log_likelihoods(hf), rel=CLOSE)
    assert generated(ours) == generated(hf)
    assert (ours.max_length, ours.prefix_token_id) == (hf.max_length, hf.prefix_token_id)


def test_a_plain_gpt_of_the_same_weights_is_told_apart(folder: Path, tmp_path: Path) -> None:
    """What lm-eval's ``megatron_lm`` would build: Megatron's own GPT, filled without an error."""
    save_tokenizer(tmp_path / "tokenizer")
    save(tmp_path, "plain", SKIPPING, sla=False)
    ours = checkpoint_model(folder / "checkpoints")
    expected = log_likelihoods(ours)
    ours.close()
    found = log_likelihoods(checkpoint_model(tmp_path / "plain"))
    differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    assert sum(difference > 100 * CLOSE for difference in differences) > 0.9 * len(differences)


def run_here(argv: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sla_megatron.commands.evaluate import cli

    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["sla-eval", *argv])
    cli.main()


def results(path: Path) -> tuple[dict[str, Any], dict[tuple[str, int], Any]]:
    """What lm-eval wrote there, once: metrics of each task, and the answers to each document."""
    (aggregated,) = path.glob("*/results_*.json")
    answers = {}
    for file in path.glob("*/samples_*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            answers[file.name.removeprefix("samples_").rpartition("_")[0], line["doc_id"]] = line["resps"]
    return json.loads(aggregated.read_text())["results"], answers


def numbers(answers: dict[tuple[str, int], Any]) -> dict[tuple[str, int], list[float]]:
    """The log-likelihoods among them."""
    first = {key: [found[0] for found in each] for key, each in answers.items() if key[0] != "my_words"}
    return {key: [float(x if isinstance(x, str | float) else x[0]) for x in each] for key, each in first.items()}


ALL_TASKS = shlex.split("--include_path tasks --tasks my_choices,my_texts,my_words --batch_size 3 --log_samples")


@pytest.mark.distributed
def test_over_several_ranks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's command in one process; and all tasks on two ranks, whatever they share: the same, written once."""
    words = shlex.split(block("HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 sla-eval"))
    run_here(words[words.index("sla-eval") + 1 :], folder, monkeypatch)
    readme, _ = results(folder / "results")
    gc.collect()

    def command(out: str, arguments: str) -> list[str]:
        named = ["--model", "sla_megatron", "--model_args", arguments]
        return [*named, *ALL_TASKS, "--output_path", str(tmp_path / out)]

    for name in ("checkpoints", "experts"):
        run_here(command(name, f"load={name}"), folder, monkeypatch)
        gc.collect()
    commands = {
        "tensor": command("tensor", "load=checkpoints,tensor_model_parallel_size=2"),
        "pipeline": command("pipeline", "load=checkpoints,pipeline_model_parallel_size=2"),
        "copies": command("copies", "load=checkpoints,devices=2"),
        "shared-experts": command("shared-experts", "load=experts,expert_model_parallel_size=2"),
        "refused": command("refused", "load=checkpoints,tensor_model_parallel_size=3"),
    }
    request = {"folder": folder, "ports": free_ports(len(commands)), "commands": list(commands.values())}
    assert run_worker("evaluate_worker", request, 2, tmp_path / "ranks") == [[0, 0, 0, 0, 2]] * 2
    errors = [line for line in (tmp_path / "ranks" / "rank0.log").read_text().splitlines() if "sla-eval: error" in line]
    assert len(errors) == 1 and "tensor_model_parallel_size=3" in errors[0]

    alone = {name: results(tmp_path / name) for name in ("checkpoints", "experts")}
    assert alone["checkpoints"][0]["my_choices"]["acc,none"] == readme["my_choices"]["acc,none"]
    for name in list(commands)[:-1]:
        metrics, answers = results(tmp_path / name)
        expected_metrics, expected = alone["experts" if "experts" in name else "checkpoints"]
        assert answers.keys() == expected.keys() and len(answers) == 3 * len(QUESTIONS)
        assert numbers(answers) == {key: pytest.approx(each, rel=CLOSE) for key, each in numbers(expected).items()}
        for task, metric in (("my_choices", "acc,none"), ("my_words", "exact_match,none")):
            assert metrics[task][metric] == expected_metrics[task][metric]
        assert {k: v for k, v in answers.items() if k[0] == "my_words"} == {
            k: v for k, v in expected.items() if k[0] == "my_words"
        }


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


def test_texts_of_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    """NullTokenizer has none of its own; one with more tokens than the model is refused."""
    from sla_megatron.common.errors import StartError

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


@pytest.mark.parametrize(
    ("argv", "world", "message"),
    [
        (["--model_args", "load=checkpoints,colour=red"], "1", "model_args colour: sla_megatron has no such argument"),
        (["--model_args", "load=checkpoints", "--use_cache", "kept"], "2", "--use_cache: expected one process"),
    ],
)
def test_the_command_ends_in_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    world: str,
    message: str,
) -> None:
    """Exit status 2, and nothing is written."""
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit) as ended:
        run_here(["--model", "sla_megatron", *argv, *ALL_TASKS, "--output_path", "refused"], folder, monkeypatch)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sla-eval: error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not (folder / "refused").exists()
