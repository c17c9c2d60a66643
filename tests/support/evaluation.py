"""A text, a tokenizer of it, questions about it, and what examples/evaluate says of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .launch import ROOT

README = (ROOT / "examples" / "evaluate" / "README.md").read_text()

# With a character of two bytes and a line end of two.
TEXT = 4 * (
    "It was a bright cold day in spring, and the clocks were striking. A smell of cabbage and old mats met him\r\n"
    "on the stairs; the café below was shut, and nobody had come up since the lights went out.\n"
)
QUESTIONS = [
    {"question": "It was a bright", "choices": ["cold day", "café", "smell of old mats"], "answer": 0},
    {"question": "the clocks", "choices": ["were striking", "went out"], "answer": 0},
    {"question": "on", "choices": ["him", "the stairs; the lights went out."], "answer": 1},
    {"question": "A smell of cabbage and old mats met", "choices": ["nobody", "him"], "answer": 1},
]


def block(start: str) -> str:
    """The README's block that begins so."""
    (found,) = [b for b in re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if b.startswith(start)]
    return found


def save_tokenizer(folder: Path) -> None:
    """The checkpoint is one of NullTokenizer: this one is small enough for its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)


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


def evaluated(model: Any, task: str) -> dict[str, list[float]] | None:
    """Each question's log-likelihoods of its choices, as lm-eval finds them; ``None`` where it would write nothing.

    ``task`` is one in the folder ``tasks``.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path="tasks", include_defaults=False)
    found = simple_evaluate(model, tasks=[task], task_manager=tasks, log_samples=True)
    return None if found is None else scores(found["samples"][task])


def scores(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The same of samples, as they are or as they are written."""
    return {sample["doc"]["question"]: [float(each[0][0]) for each in sample["resps"]] for sample in samples}
