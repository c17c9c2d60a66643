"""The world's tools on the Hugging Face model: adapters, trainers, quantisers, exporters, sharding.

Each is tried on a small SLA model, with two distances, fewer groups than heads and rotary positions, and compared with
plain torch on the same one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM
from tests.support.hf_fsdp_worker import MODELS as SHARDED
from tests.support.launch import start_ranks, wait_for_ranks
from tests.unit.hf.hf_models import VOCABULARY, build, relative_error, tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

MODES = {
    "full": {},
    "pruned": {"sla_kv_projection": "pruned"},
    # Layers keep all four groups, two of them or none.
    "pruned, all groups skip": {
        **{"sla_kv_projection": "pruned", "sla_skip_groups": [0, 1, 2, 3]},
        **{"sla_skip_distances": [1, 2], "num_hidden_layers": 4},
    },
}
#: Layers keep four values of their own, and no keys or all four.
KEYS_ALONE = {
    **{"sla_share": "keys", "sla_skip_distances": [], "sla_source_layers": [1], "sla_skip_groups": [0, 1, 2, 3]},
    **{"sla_kv_projection": "pruned", "num_hidden_layers": 4},
}
#: Steps of training, and the rate.
STEPS, RATE = 2, 0.05


def model(mode: str = "full", **changes: Any) -> SlaGPTForCausalLM:
    return build(tiny(**MODES[mode], **changes), dtype=torch.float32)


def linears(of: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in of.named_modules() if isinstance(module, nn.Linear)}


def next_token_loss(logits: Tensor, batch: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def descend(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    for _ in range(STEPS):
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
            parameter.data -= RATE * gradient


# Adapters.


def adapted(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None) -> Tensor:
    """LoRA's weight, arXiv 2106.09685, and with magnitudes DoRA's, arXiv 2402.09353, whose norm has no gradient."""
    weight = weight + 2.0 * b @ a
    if magnitude is None:
        return weight
    return (magnitude / weight.norm(dim=1).detach())[:, None] * weight


@pytest.mark.parametrize(("mode", "is_dora"), [("full", False), ("pruned", True)], ids=["LoRA", "DoRA"])
def test_peft(mode: str, is_dora: bool, tmp_path: Path, card: Callable) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    plain, batch = model(mode), tokens()
    how = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", use_dora=is_dora, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(plain), how)
    kinds = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if is_dora else [])]
    # Tied to the embeddings, the head is no target.
    targets = sorted(name for name in linears(plain) if name != "lm_head")
    keys = [f"base_model.model.{name}.{kind}.default.weight" for name in targets for kind in kinds]
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert sorted(trained) == sorted(keys)

    ours = {name: trained[name].detach().clone().requires_grad_() for name in keys}

    def logits() -> Tensor:
        weights = {}
        for name in targets:
            a, b, *magnitude = (ours[f"base_model.model.{name}.{kind}.default.weight"] for kind in kinds)
            weight = plain.get_parameter(f"{name}.weight").detach()
            weights[f"{name}.weight"] = adapted(weight, a, b, magnitude[0] if magnitude else None)
        return torch.func.functional_call(plain, weights, (batch,)).logits

    descend(lambda: next_token_loss(logits(), batch), list(ours.values()))
    optimizer = torch.optim.SGD(trained.values(), lr=RATE)
    for _ in range(STEPS):
        wrapped.train()(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max((trained[name] - ours[name]).abs().max().item() for name in keys) <= 1e-5
    assert min(ours[name].abs().max().item() for name in keys if "lora_B" in name) > 1e-5

    with torch.no_grad():
        expected, before = logits(), plain(batch).logits
        assert relative_error(expected, before) > 1e-3
        wrapped.eval().save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        errors = {}
        for name, each in {"trained": wrapped, "loaded": loaded, "merged": wrapped.merge_and_unload()}.items():
            errors[f"logits, {name}, relative error"] = relative_error(each(batch).logits, expected)
        assert max(errors.values()) <= 1e-5
    command = 'peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))'
    card("fine-tuning", command, errors | {"tensors that were trained": len(keys)})


# Trainers.


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["pad", "eos", "bos", *(f"t{number}" for number in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="pad"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="pad", eos_token="eos", bos_token="bos")


def trainer_settings(folder: Path) -> dict[str, Any]:
    """The whole of the data in each step, without what is not asked of it."""
    return {
        **{"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": RATE},
        **{"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "bf16": False},
        **{"report_to": [], "save_strategy": "no", "dataloader_pin_memory": False, "disable_tqdm": True},
    }


def require_same(found: nn.Module, expected: nn.Module, start: nn.Module) -> None:
    moved = 0.0
    for name, parameter in expected.named_parameters():
        assert relative_error(found.get_parameter(name), parameter) <= 1e-5, name
        moved = max(moved, relative_error(start.get_parameter(name), parameter))
    assert moved > 1e-3


def test_trl_supervised(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    start, batch = model(), tokens(4)
    trained, expected = copy.deepcopy(start), copy.deepcopy(start).train()
    descend(lambda: next_token_loss(expected(batch).logits, batch), list(expected.parameters()))
    settings = trl.SFTConfig(**trainer_settings(tmp_path))
    data = datasets.Dataset.from_dict({"input_ids": batch.tolist()})
    trl.SFTTrainer(model=trained, args=settings, train_dataset=data, processing_class=words).train()
    require_same(trained, expected, start)


def test_trl_preferences(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    """DPO, arXiv 2305.18290: of the better text and of the worse one, how much more likely than the model at first."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    start, beta = model("pruned"), 0.1
    trained, expected = copy.deepcopy(start), copy.deepcopy(start).train()
    # No padding, so that there is one way to write it; texts end with what ends them.
    prompts, better, worse = tokens(4, 5).clamp(min=3), tokens(4, 6, 2).clamp(min=3), tokens(4, 6, 3).clamp(min=3)
    ends = torch.ones(4, 1, dtype=torch.long)

    def likelihood(of: nn.Module, answers: Tensor) -> Tensor:
        text = torch.cat((prompts, answers, ends), dim=1)
        scores = of(text).logits[:, :-1].log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]
        return scores[:, prompts.shape[1] - 1 :].sum(-1)

    def loss() -> Tensor:
        with torch.no_grad():
            before = likelihood(start, better) - likelihood(start, worse)
        return -F.logsigmoid(beta * (likelihood(expected, better) - likelihood(expected, worse) - before)).mean()

    descend(loss, list(expected.parameters()))
    written = ([" ".join(words.convert_ids_to_tokens(row)) for row in rows.tolist()] for rows in (better, worse))
    asked = [" ".join(words.convert_ids_to_tokens(row)) + " " for row in prompts.tolist()]
    chosen, rejected = ([f"{text} " for text in texts] for texts in written)
    data = datasets.Dataset.from_dict({"prompt": asked, "chosen": chosen, "rejected": rejected})
    settings = trl.DPOConfig(**trainer_settings(tmp_path), beta=beta)
    trainer = trl.DPOTrainer(
        model=trained, ref_model=copy.deepcopy(start), args=settings, train_dataset=data, processing_class=words
    )
    trainer.train()
    require_same(trained, expected, start)


# Quantisation.


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def packed_int4() -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=32)


@pytest.mark.parametrize(
    ("how", "dtype", "close"),
    [(int8, torch.float32, 1e-5), (int4, torch.float32, 1e-5), (packed_int4, torch.bfloat16, 0.1)],
    ids=["int8", "int4", "int4 packed"],
)
@pytest.mark.parametrize("mode", ["full", "pruned"])
def test_torchao(mode: str, how: Callable[[], Any], dtype: torch.dtype, close: float) -> None:
    """Weights alone.

    torchao 0.18's ``Int4WeightOnlyConfig`` is for accelerators in each of its packings.  A CPU has
    ``IntxWeightOnlyConfig``, which keeps a byte for each number, and a prototype that packs two into one.
    """
    torchao = pytest.importorskip("torchao.quantization")
    quantised = model(mode, hidden_size=64, head_dim=32, vocab_size=64, tie_word_embeddings=False).to(dtype)
    plain = copy.deepcopy(quantised)
    torchao.quantize_(quantised, how())
    changed = 0.0
    for name, linear in linears(quantised).items():
        assert type(linear.weight) is not nn.Parameter, name
        # What the weight does to the unit vectors is the weight.
        unit = torch.eye(linear.in_features, dtype=dtype)
        weight = linear(unit).detach() - (0 if linear.bias is None else linear.bias.detach())
        ours = plain.get_submodule(name).weight
        changed = max(changed, relative_error(weight.T, ours))
        ours.data.copy_(weight.T)
    assert changed > 1e-3
    with torch.no_grad():
        assert relative_error(quantised(tokens()).logits, plain(tokens()).logits) <= close
    if dtype == torch.float32:
        asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert quantised.generate(tokens(), **asked).equal(plain.generate(tokens(), **asked))


# Exporters.


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", MODES)
def test_a_static_cache_that_is_made_before_it_is_filled(mode: str) -> None:
    """With chunks of a prompt, transformers makes it so: each layer's part has the size of what the layer keeps."""
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    static = {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True}
    out = model(mode).generate(tokens(), **asked, **static, return_dict_in_generate=True)
    assert out.sequences.equal(model(mode).generate(tokens(), **asked))
    kept = [4, 4, 2, None] if "all" in mode else [4, 4, 4, 4, 1, 1]
    found = [None if layer.keys is None else layer.keys.shape[1] for layer in out.past_key_values.layers]
    assert found == kept


@pytest.mark.parametrize("changes", [MODES["pruned, all groups skip"], KEYS_ALONE], ids=["both", "keys alone"])
def test_executorch_s_wrapper(changes: dict[str, Any], compiler: None) -> None:
    """Exported with its static cache, it generates the model's tokens."""
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    prompt, new = tokens(1, 5), 4
    expected = model(**changes).generate(
        prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )
    exported = model(**changes)
    size = {"batch_size": 1, "max_cache_len": 16, "device": "cpu"}
    exported.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=size)
    wrapper = TorchExportableModuleForDecoderOnlyLM(exported)
    program = wrapper.export(input_ids=prompt[:, :1], cache_position=torch.tensor([0]), strict=False)
    step, text = program.module(), prompt
    for position in range(prompt.shape[1] + new - 1):
        logits = step(input_ids=text[:, position : position + 1], cache_position=torch.tensor([position]))
        if position + 1 == text.shape[1]:
            text = torch.cat((text, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert text.equal(expected)


def test_torch_export(compiler: None) -> None:
    whole = model("pruned, all groups skip")
    length = {"input_ids": {1: torch.export.Dim("length", min=2, max=60)}, "use_cache": None}
    inputs = {"input_ids": tokens(), "use_cache": False}
    program = torch.export.export(whole, (), inputs, dynamic_shapes=length, strict=False)
    other = tokens(2, 17)
    with torch.no_grad():
        found = program.module()(input_ids=other, use_cache=False).logits
        assert relative_error(found, whole(other).logits) <= 1e-5


# Sharding.


@pytest.mark.distributed
def test_fsdp2(tmp_path: Path) -> None:
    """accelerate's, on two ranks of gloo, a sequence each: the gradients of a model that is whole, of both sequences.

    Keys and values leave a layer as its outputs and enter another one as its inputs, which FSDP2 watches.
    """
    pytest.importorskip("accelerate")
    worker = ["-m", "tests.support.hf_fsdp_worker", str(tmp_path / "gradients.pt")]
    wait_for_ranks(start_ranks(worker, 2, tmp_path), tmp_path, timeout=120)
    found = torch.load(tmp_path / "gradients.pt")
    for name, changes in SHARDED.items():
        whole, batch = build(tiny(**changes)).train(), tokens()
        F.cross_entropy(whole(batch).logits.flatten(0, 1), batch.flatten()).backward()
        expected = {key: p.grad for key, p in whole.named_parameters() if p.grad is not None}
        assert found[name].keys() == expected.keys()
        assert max(relative_error(found[name][key], expected[key]) for key in expected) <= 1e-10, name
