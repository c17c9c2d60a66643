"""Evaluation of an exported model: lm-eval as documented, and perplexity.py, against the model's own logits."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.evaluate import perplexity
from tests.support.convert_models import save_random_checkpoint
from tests.support.evaluation import QUESTIONS, TEXT, block, save_tokenizer
from tests.support.launch import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 32
FLAGS = {"sla": True, "sla_skip_distance": [1, 2], "sla_num_skip_groups": 2, "max_position_embeddings": LENGTH}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoints`` of a random skip-layer model, ``exported`` with a tokenizer, and ``text.txt``."""
    from sla_megatron.commands.convert.commands import megatron_to_hf, open_megatron

    path = tmp_path_factory.mktemp("evaluate")
    save_random_checkpoint(path / "checkpoints", FLAGS | {"seq_length": LENGTH})
    megatron_to_hf(open_megatron(path / "checkpoints"), path / "exported")
    save_tokenizer(path / "exported")
    (path / "text.txt").write_bytes(TEXT.encode())
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """The exported model in fp64, whose own rounding does not count."""
    from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

    return SlaGPTForCausalLM.from_pretrained(folder / "exported", dtype=torch.float64).eval()


def token_ids(folder: Path, text: str) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder / "exported")(text, add_special_tokens=False)["input_ids"]


# lm-eval


def log_probability(model: Any, folder: Path, context: str, continuation: str) -> float:
    """Of the continuation's tokens, each after all that come before it."""
    prompt, whole = token_ids(folder, context), token_ids(folder, context + continuation)
    assert whole[: len(prompt)] == prompt and len(whole) <= LENGTH
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))


def test_lm_eval_sees_the_models_probabilities(folder: Path, model: Any) -> None:
    """The README's offline task and command, on questions of different lengths that share a batch.

    lm-eval computes in fp32: what is left is the rounding of its logits, about 1e-6 of a log-likelihood.
    """
    (folder / "tasks").mkdir()
    (folder / "tasks" / "my_choices.yaml").write_text(block("task: my_choices"))
    (folder / "tasks" / "my_choices.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(folder / "home"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["sh", "-c", block("HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 lm_eval")]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]

    (samples,) = folder.glob("results/*/samples_my_choices_*.jsonl")
    found = {line["doc"]["question"]: line for line in map(json.loads, samples.read_text().splitlines())}
    dense = without_skipping(model)
    for question in QUESTIONS:
        logged = [float(response[0][0]) for response in found[question["question"]]["resps"]]
        asked = [(question["question"], " " + choice) for choice in question["choices"]]
        expected = [log_probability(model, folder, *pair) for pair in asked]
        assert logged == pytest.approx(expected, rel=1e-5)
        best = expected.index(max(expected))
        assert found[question["question"]]["acc"] == float(best == question["answer"])
        # What a plain GPT of the same weights says is something else.
        plain = [log_probability(dense, folder, *pair) for pair in asked]
        assert all(abs(a - b) > 1e-2 for a, b in zip(plain, expected, strict=True))


def without_skipping(model: Any) -> Any:
    from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

    config = type(model.config)(**model.config.to_dict() | {"sla_skip_distances": [], "sla_skip_groups": []})
    dense = SlaGPTForCausalLM(config).double().eval()
    dense.load_state_dict(model.state_dict())
    return dense


# perplexity.py


def losses_of_windows(model: Any, ids: list[int]) -> list[float]:
    """The loss of every predicted token, window after window."""
    found = []
    for start in range(0, len(ids), LENGTH):
        window = ids[start : start + LENGTH]
        with torch.no_grad():
            logs = model(torch.tensor([window])).logits[0].log_softmax(-1)
        found += [-logs[i - 1, window[i]].item() for i in range(1, len(window))]
    return found


def test_perplexity_is_that_of_the_model_and_of_megatron(folder: Path, model: Any) -> None:
    """As it is run; three whole windows or more, in batches of two, and a shorter one."""
    ids = token_ids(folder, TEXT)
    assert len(ids) > 3 * LENGTH and len(ids) % LENGTH > 1
    losses = losses_of_windows(model, ids)
    loss = sum(losses) / len(losses)

    script = str(ROOT / "examples" / "evaluate" / "perplexity.py")
    command = [sys.executable, script, "text.txt", "--hf", "exported", "--megatron", "checkpoints", "--batch-size", "2"]
    environment = os.environ | {"HF_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]

    text, exported, megatron, verdict = run.stdout.splitlines()
    size = len(TEXT.encode())
    assert text == f"text.txt: {size} bytes, {len(ids)} tokens, {len(losses)} predicted in windows of {LENGTH}"
    found = re.fullmatch(r"exported: loss (\S+), perplexity (\S+), bits per byte (\S+)", exported)
    assert float(found[1]) == pytest.approx(loss, rel=1e-6)
    assert float(found[2]) == pytest.approx(math.exp(loss), rel=1e-5)
    assert float(found[3]) == pytest.approx(loss / math.log(2) * len(ids) / size, rel=1e-6)
    by_megatron = re.fullmatch(r"checkpoints: loss (\S+), perplexity \S+, by Megatron", megatron)
    assert float(by_megatron[1]) == pytest.approx(float(found[1]), rel=1e-6)
    assert verdict.startswith("losses equal: difference ")


def test_another_loss_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's loss of the checkpoint is not the one that it is compared with: exit status 1."""
    checkpoint, size = (
        folder / "checkpoints",
        json.loads((folder / "exported" / "config.json").read_text())["vocab_size"],
    )
    batches = perplexity.windows(torch.arange(80), LENGTH)
    with perplexity.megatron_logits(checkpoint, size, LENGTH) as logits:
        loss = perplexity.mean_loss(logits, batches, "")
    assert perplexity.compare(checkpoint, batches, size, loss) == 0
    assert perplexity.compare(checkpoint, batches, size, loss * (1 + 2e-5)) == 1
    assert "losses NOT equal (threshold 1e-05): difference" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2, 7, 8, 9, 10, 24, 25, 30])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_windows_have_every_token_once(count: int, batch_size: int) -> None:
    """In order; only a rest of one token, of which nothing is predicted, is left out."""
    batches = perplexity.windows(torch.arange(count), 8, batch_size)
    kept = count - 1 if count % 8 == 1 else count
    assert torch.cat([batch.flatten() for batch in batches]).tolist() == list(range(kept))
    assert all(len(batch) <= batch_size and batch.shape[1] <= 8 for batch in batches)
    assert perplexity.num_predicted(batches) == kept - math.ceil(kept / 8)


def test_what_cannot_be_evaluated_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, and the path at fault."""
    shutil.copytree(folder / "exported", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(folder / "exported", tmp_path / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folder / "exported", tmp_path / "garbled")
    (tmp_path / "garbled" / "tokenizer.json").write_text("{")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    good, text = ["--hf", str(folder / "exported")], str(folder / "text.txt")
    for argv, expected in [
        ([str(tmp_path / "none.txt"), *good], "none.txt: No such file or directory"),
        ([str(tmp_path / "empty.txt"), *good], "empty.txt: the file is empty"),
        ([str(tmp_path / "latin1.txt"), *good], "latin1.txt: not UTF-8 at byte 3"),
        ([text, "--hf", str(tmp_path / "nowhere")], "nowhere: no config.json"),
        ([text, "--hf", str(tmp_path / "bare")], "bare: no tokenizer; "),
        ([text, "--hf", str(tmp_path / "garbled")], "garbled: its tokenizer does not load: "),
        ([text, "--hf", str(tmp_path / "broken")], "broken: "),
        ([text, *good, "--megatron", str(tmp_path / "nowhere")], "nowhere: no such checkpoint folder"),
        ([text, *good, "--megatron", str(tmp_path)], f"{tmp_path}: no torch_dist checkpoint"),
    ]:
        assert perplexity.main(argv) == 2
        message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("perplexity: error: ")]
        assert len(message) == 1 and expected in message[0]
