"""vLLM with the plugin: transformers' own tokens and log-probabilities, and the formula's cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams

from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

from .engine import (
    NEW_TOKENS,
    VOCABULARY,
    answers,
    asked,
    cache_bytes_per_token,
    engine,
    generated,
    load,
    log_probabilities,
    prompts,
    write_export,
)
from .without_plugin import LENGTHS

LLAMA_LIKE = {
    **{"num_key_value_heads": 4, "position_embedding_type": "rope", "normalization": "RMSNorm", "gated_mlp": True},
    **{"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
}
#: Name -> changes of the shape, and of the 6 layers how many (layer, group) pairs are live, counted by hand.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    # Layers 1 and 2 are read by themselves, 3 and 4 keep all groups too, of which the skipping ones are read by 5 and 6
    # alone; 5 and 6 keep four of eight.
    "mha, learned, pruned": (
        {"sla_skip_distances": [2], "sla_skip_groups": [1, 3, 5, 7], "sla_kv_projection": "pruned"},
        4 * 8 + 2 * 4,
    ),
    # Groups 1 and 3 skip two layers, group 2 four: dead are 1 and 3 in layers 5 and 6, and 2 in layers 5 and 6 as well.
    "gqa, rope, two distances, full": (
        LLAMA_LIKE | {"qk_layernorm": True, "sla_skip_distances": [2, 4], "sla_skip_groups": [1, 2, 3]},
        6 * 4 - 6,
    ),
    # In layer 5 alone: group 0 reads layer 4, groups 1 and 2 layer 2. Dead are its own three.
    "gqa, rope, pruned, one layer": (
        {
            **{"num_key_value_heads": 4, "position_embedding_type": "rope", "rotary_percent": 0.5},
            **{"rotary_interleaved": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            **{"norm_zero_centered": True, "hidden_act": "relu2", "attention_output_bias": False},
            **{"sla_skip_distances": [1, 3, 3], "sla_skip_groups": [0, 1, 2], "sla_layers": [5]},
            **{"sla_kv_projection": "pruned"},
        },
        6 * 4 - 3,
    ),
    # The last three layers have weights for keys and values that nobody reads.
    "all groups skip": (
        LLAMA_LIKE | {"qk_layernorm": True, "sla_skip_distances": [3], "sla_skip_groups": [0, 1, 2, 3]},
        3 * 4,
    ),
    # Groups 0 and 3 of layers 4 to 6 read layer 3's cache, and group 1 of all later layers reads layer 1's.
    "gqa, rope, many readers, full": (
        LLAMA_LIKE | {"qk_layernorm": True, "sla_source_layers": [3, 1], "sla_skip_groups": [0, 1, 3]},
        6 * 4 - 2 * 3 - 5,
    ),
    # vLLM keeps as many values as keys, so all of them.
    "mha, learned, values, pruned": (
        {
            **{"sla_share": "values", "sla_source_layers": [1], "sla_skip_groups": [1, 3, 5, 7]},
            **{"sla_kv_projection": "pruned"},
        },
        6 * 8,
    ),
    # Layers 4 to 6 have values of their own and no keys.
    "gqa, rope, keys, pruned": (
        LLAMA_LIKE
        | {"qk_layernorm": True, "sla_share": "keys", "sla_skip_distances": [3], "sla_skip_groups": [0, 1, 2, 3]}
        | {"sla_kv_projection": "pruned"},
        6 * 4,
    ),
    "dense": (LLAMA_LIKE, 6 * 4),
}
#: Bytes of one pair's keys and values in fp32.
PAIR = 2 * 32 * 4


@dataclass
class Served:
    """An export, as transformers loads it, and as vLLM does with prompts of at most 32 tokens a step."""

    folder: Path
    model: PreTrainedModel
    llm: LLM
    live: int


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("export")
    changes, live = CASES[request.param]
    write_export(folder, **changes)
    with engine(folder, max_num_batched_tokens=32) as llm:
        yield Served(folder, load(folder), llm, live)


def test_generates_what_transformers_does(served: Served, card: Callable) -> None:
    """Together and alone, prompts in one step and in chunks, and of one token."""
    texts = prompts(1, 5, 31, 66, 100)
    expected = [generated(served.model, text) for text in texts]
    assert answers(served.llm, texts) == expected
    served.llm.reset_prefix_cache()
    assert [answers(served.llm, [text])[0] for text in texts] == expected
    results = {"equal tokens": len(texts) * NEW_TOKENS, "cache, bytes a token": cache_bytes_per_token(served.llm)}
    results["cache, the formula's"] = served.live * PAIR
    card("engine", 'LLM("exported", dtype="float32", enforce_eager=True, max_num_batched_tokens=32)', results)


def test_log_probabilities_of_a_prompt(served: Served) -> None:
    text = prompts(80)[0]
    answer = asked(served.llm, [text], prompt_logprobs=0, max_tokens=1)[0]
    found = torch.tensor([of[token].logprob for of, token in zip(answer.prompt_logprobs[1:], text[1:], strict=True)])
    torch.testing.assert_close(found, log_probabilities(served.model, text), atol=1e-4, rtol=1e-5)


def test_a_shared_prefix_is_computed_once(served: Served) -> None:
    """Two prompts that go on differently after a block of the cache."""
    shared, one, other = prompts(130, 9, 7)
    served.llm.reset_prefix_cache()
    for end, hits in ((one, False), (other, True)):
        answer = asked(served.llm, [shared + end])[0]
        assert list(answer.outputs[0].token_ids) == generated(served.model, shared + end)
        assert (answer.num_cached_tokens > 0) == hits


def test_the_cache_is_the_formulas(served: Served) -> None:
    """By vLLM's own accounting: live pairs, each once."""
    assert cache_bytes_per_token(served.llm) == served.live * PAIR


def test_plain_attention_would_generate_something_else(tmp_path: Path) -> None:
    """What is compared depends on which layer is read."""
    write_export(tmp_path, **CASES["gqa, rope, two distances, full"][0])
    model = load(tmp_path)
    dense = SlaGPTForCausalLM(SlaGPTConfig.from_dict(model.config.to_dict() | {"sla_skip_distances": []})).eval()
    dense.load_state_dict(model.state_dict())
    text = prompts(66)[0]
    assert generated(dense, text) != generated(model, text)


def test_two_ranks_generate_what_transformers_does(tmp_path: Path) -> None:
    """Of groups whose shares are no neighbours, each rank with half of the cache."""
    changes = {"sla_skip_distances": [1, 2], "sla_skip_groups": [0, 1, 3, 4]}
    write_export(tmp_path, **(LLAMA_LIKE | changes | {"num_attention_heads": 16, "num_key_value_heads": 8}))
    texts = prompts(5, 66)
    with engine(tmp_path, tensor_parallel_size=2, max_num_batched_tokens=32) as llm:
        assert answers(llm, texts) == [generated(load(tmp_path), text) for text in texts]
        # Of six layers of eight groups, two are dead in the last, and in each of the last two, two more.
        assert cache_bytes_per_token(llm) == (6 * 8 - 2 - 4) / 2 * PAIR


def test_without_the_plugin_transformers_model_runs(tmp_path: Path) -> None:
    """vLLM's own way, with a whole cache for each layer."""
    names = ["mha, learned, pruned", "gqa, rope, two distances, full", "gqa, rope, keys, pruned"]
    folders = [tmp_path / name.replace(", ", "_") for name in names]
    for name, folder in zip(names, folders, strict=True):
        write_export(folder, **CASES[name][0])
    command = [sys.executable, "-m", "tests.serving.without_plugin", *map(str, folders)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert done.returncode == 0 and len(found) == len(names), done.stderr[-5000:]
    for folder, (tokens, size) in zip(folders, found, strict=True):
        model = load(folder)
        assert tokens == [generated(model, text) for text in prompts(*LENGTHS)]
        assert size == 6 * model.config.num_key_value_heads * PAIR


def test_compiled(tmp_path: Path) -> None:
    """As vLLM runs it by default: the whole model is one graph."""
    changes = {"num_hidden_layers": 3, "sla_skip_distances": [1], "sla_skip_groups": [1, 2, 3]}
    write_export(tmp_path, **(LLAMA_LIKE | changes))
    texts = prompts(5, 66)
    with engine(tmp_path, enforce_eager=False) as llm:
        assert answers(llm, texts) == [generated(load(tmp_path), text) for text in texts]


def test_text_is_answered_with_text(tmp_path: Path) -> None:
    """By the tokenizer of the folder, and nothing that needs ``trust_remote_code``."""
    write_export(tmp_path, **CASES["mha, learned, pruned"][0])
    words = {f"w{token}": token for token in range(VOCABULARY)}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    prompt = prompts(20)[0]
    with engine(tmp_path, skip_tokenizer_init=False) as llm:
        parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        answer = llm.generate(" ".join(f"w{token}" for token in prompt), parameters, use_tqdm=False)[0]
    assert answer.outputs[0].text.split() == [f"w{token}" for token in generated(load(tmp_path), prompt)]


def test_an_export_of_before_is_served(tmp_path: Path) -> None:
    """With its padding beside the weights, where vLLM reads all there is, and with its own code, which is not used."""
    write_export(tmp_path, **CASES["mha, learned, pruned"][0])
    text = prompts(66)[0]
    expected = generated(load(tmp_path), text)
    save_file({"model.embed_tokens.weight": torch.ones(3, 64)}, tmp_path / "megatron_padding.safetensors")
    with engine(tmp_path, trust_remote_code=True) as llm:
        assert answers(llm, [text]) == [expected]


@pytest.mark.parametrize(
    ("changes", "options", "error"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "rope_type=dynamic changes frequencies"),
        ({}, {"quantization": "fp8", "dtype": "bfloat16"}, "quantization=fp8 is not for SlaGPTForCausalLM"),
        ({}, {"pipeline_parallel_size": 2}, "Pipeline parallelism is not supported for this model"),
        ({}, {"enable_lora": True}, "SlaGPTForCausalLM does not support LoRA"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], options: dict[str, Any], error: str, tmp_path: Path) -> None:
    write_export(tmp_path, **(LLAMA_LIKE | changes))
    with pytest.raises(Exception, match=error), engine(tmp_path, **options):
        pass
