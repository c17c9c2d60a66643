"""On each rank: build Megatron's SLA model for each case, and compare it with ``tests/reference.py``.

Answers, for each case, the relative errors of the logits and of every parameter's gradient, by name.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sla_megatron.cpu.device import megatron_device
from tests.support.sequences import Documents, chunks_of_ranks, share, whole_sequence

VOCABULARY, SEQUENCE, BATCH, HIDDEN, HEAD_SIZE = 32, 16, 2, 32, 8
LAYERS, HEADS = 4, 4
#: Changing this token must change no logit before it.
CHANGED_TOKEN = 7


def main(folder: Path, compare: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer every case of ``folder/request.json``, tensor- and context-parallel size by size."""
    request = json.loads((folder / "request.json").read_text())
    logging.disable(logging.WARNING)
    with megatron_device(["--device", os.environ.get("SLA_TEST_DEVICE", "cpu")]) as device:
        import torch
        from megatron.core import parallel_state

        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
        answers = {}
        for sizes in sorted({_sizes(case) for case in request.values()}):
            tensor, context, hierarchy = sizes
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tensor,
                context_parallel_size=context,
                hierarchical_context_parallel_sizes=list(hierarchy) or None,
            )
            for name, case in request.items():
                if _sizes(case) == sizes:
                    answers[name] = compare(case)
            parallel_state.destroy_model_parallel()
        if torch.distributed.get_rank() == 0:
            (folder / "answer0.json").write_text(json.dumps(answers))


def _sizes(case: dict[str, Any]) -> tuple[int, int, tuple[int, ...]]:
    """Of the tensor- and the context-parallel groups, and of those that the latter consist of."""
    return case["tp"], case.get("cp", 1), tuple(case.get("hierarchy", ()))


def run_case(case: dict[str, Any]) -> dict[str, float]:
    """One model against the reference; every number is ``|found - expected| / |expected|`` over the whole tensor.

    With ``draws`` of weights and tokens, the root of the mean square over them.
    """
    import torch
    from megatron.core import tensor_parallel

    from sla_megatron.cpu.backend import cpu_backend_is_active
    from tests.support import offloading

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    reference, model, full_shapes = build(case)
    generator = torch.Generator().manual_seed(17)
    documents = Documents(case.get("documents", [[0]] * BATCH), SEQUENCE, case.get("packed", "sbhd"))
    # What is offloaded is decided in a first step, and done in the next ones as in the first or otherwise.
    draws = case.get("draws", 3 if case.get("offload") else 1)
    with offloading.offloading(cpu_backend_is_active()) if case.get("offload") else nullcontext():
        repeats = case.get("repeats", False)
        answers = [compare(reference, model, full_shapes, generator, documents, repeats) for _ in range(draws)]
    return {
        name: {"dead rows": max, "before change": max, "after change": min}.get(name, root_mean_square)(
            [answer[name] for answer in answers]
        )
        for name in answers[0]
    }


def root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def compare(
    reference: Any,
    model: Any,
    full_shapes: dict[str, Any],
    generator: Any,
    documents: Documents,
    repeats: bool = False,
) -> dict[str, float]:
    """The errors for weights and tokens that are drawn from ``generator``; with ``repeats`` of a second step too."""
    import torch

    from tests.support import offloading, sharding

    model.train()
    weights = sharding.random_weights(full_shapes, generator)
    sharding.load(model, weights)

    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator).cuda()
    labels = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator).cuda()
    positions = documents.positions().cuda()
    packed = documents.packed_sequences()

    misread = listen_at_core_attention(model, reference.num_layers)
    logits, gradients = step(model, tokens, positions, packed, labels)
    offloads = model.config.fine_grained_activation_offloading
    if offloads:
        offloading.next_step()

    # The reference runs in double precision, so that all of the error is Megatron's fp32.
    exact = {name: tensor.cuda().double().requires_grad_() for name, tensor in weights.items()}
    expected_logits = documents.each_alone(reference, exact, tokens)
    torch.nn.functional.cross_entropy(expected_logits.flatten(0, 1), labels.flatten()).backward()
    answer = {"logits": error(logits, expected_logits.detach())}
    for name, tensor in exact.items():
        # Nobody reads the weight at all (a key norm where every group skips): the gradient to expect is zero.
        tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        answer[name] = error(gradients[name], tensor.grad)
    answer["misread by Transformer Engine"] = float(sum(misread))
    answer["dead rows"] = dead_rows(reference, exact, gradients)
    if repeats:
        _, again = step(model, tokens, positions, packed, labels)
        answer["repeated"] = max(float((again[name] - gradients[name]).abs().max()) for name in gradients)
    model.eval()
    with torch.no_grad():
        evaluated = whole_sequence(run_model(model, tokens, positions, packed))
        changed = tokens.clone()
        changed[:, CHANGED_TOKEN] = (tokens[:, CHANGED_TOKEN] + 1) % VOCABULARY
        moved = whole_sequence(run_model(model, changed, positions, packed)) - evaluated
    answer["evaluation"] = error(evaluated, expected_logits.detach())
    sees = documents.read_token(CHANGED_TOKEN).cuda()
    # Largest change of any logit that is not to see the changed token, and the smallest sum of changes of one that is.
    answer["before change"] = float(moved[~sees].abs().max())
    answer["after change"] = float(moved[sees].abs().sum(-1).min())
    return answer


def step(model: Any, tokens: Any, positions: Any, packed: Any, labels: Any) -> tuple[Any, dict[str, Any]]:
    """Logits ``[b, s, vocabulary]``, and the whole gradient of each parameter."""
    import torch
    from megatron.core.distributed import finalize_model_grads

    from tests.support import sharding

    model.zero_grad_buffer()
    logits = run_model(model, tokens, positions, packed)
    # The mean over this rank's share of the sequence; Megatron averages gradients over the ranks.
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), share(labels).flatten()).backward()
    finalize_model_grads([model])
    gradients = {name: gradient.clone() for name, gradient in sharding.gather_gradients(model).items()}
    return whole_sequence(logits.detach()), gradients


def run_model(model: Any, tokens: Any, positions: Any, packed: Any) -> Any:
    """Logits ``[b, s/C, vocabulary]`` of this rank's share of the sequence."""
    from megatron.core import tensor_parallel

    given = [share(tokens), share(positions)]
    if packed is not None and packed.qkv_format == "thd":
        given = [tensor.reshape(1, -1) for tensor in given]
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(model(*given, None, packed_seq_params=packed))
    return logits.view(BATCH, -1, VOCABULARY)


def listen_at_core_attention(model: Any, num_layers: int) -> list[bool]:
    """For each call of a layer's core attention: whether TE would take what it gets to lie otherwise than it does."""
    from tests.support.te_layout import lies_so, te_layout

    misread: list[bool] = []
    length = SEQUENCE // len(chunks_of_ranks())

    def hear(_: Any, arguments: tuple[Any, ...]) -> None:
        # Of its own share of the sequence alone: the core attention is what fetches the others'.
        tensors = [tensor if tensor.dim() == 4 else tensor.unsqueeze(1) for tensor in arguments[:3]]
        assert [math.prod(tensor.shape[:2]) for tensor in tensors] == [length * BATCH] * 3
        misread.append(not lies_so(te_layout(*tensors), *tensors))

    layers = [module for name, module in model.named_modules() if name.endswith("core_attention")]
    assert len(layers) == num_layers
    for layer in layers:
        layer.register_forward_pre_hook(hear)
    return misread


def error(found: Any, expected: Any) -> float:
    """Relative error in the 2-norm; where nothing is expected, the 2-norm of what was found."""
    difference = (found.double() - expected).norm()
    return float(difference / expected.norm()) if expected.norm() > 0 else float(difference)


def dead_rows(reference: Any, exact: dict[str, Any], gradients: dict[str, Any]) -> float:
    """The largest gradient of a K/V row that, by the reference, nobody reads: it must be exactly zero."""
    largest = 0.0
    for name, tensor in exact.items():
        if name.endswith("linear_qkv.weight"):
            dead = tensor.grad.abs().sum(dim=1) == 0
            largest = max(largest, float(gradients[name][dead].abs().sum()))
    return largest


def build(case: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The reference, the model wrapped in Megatron's DDP, and the un-sharded shape of each parameter."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection

    from sla_megatron.model import builder
    from tests.support import sharding

    transformer, pattern = transformer_config(case), case.get("pattern", "")
    num_layers = pattern.count("*") or LAYERS
    sla = sla_config(case, num_layers)
    kind = "Hybrid" if pattern else "GPT"
    config = getattr(builder, f"SLA{kind}ModelConfig")(
        transformer=transformer,
        **{"hybrid_layer_pattern": pattern} if pattern else {},
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        position_embedding_type="rope" if case["rope"] else "learned_absolute",
        rotary_percent=case.get("rotary_percent", 1.0),
        share_embeddings_and_output_weights=case.get("tied", False),
        sla=sla,
        core_attention=case.get("core_attention", "megatron"),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = getattr(builder, f"SLA{kind}ModelBuilder")(config).build_model(groups, pre_process=True, post_process=True)
    model.cuda().train()
    if case.get("bf16"):
        model.bfloat16()
    wrapped = DistributedDataParallel(
        config=transformer,
        ddp_config=DistributedDataParallelConfig(overlap_grad_reduce=True, use_distributed_optimizer=False),
        module=model,
    )
    return reference_gpt(case, num_layers), wrapped, sharding.full_shapes(wrapped)


def sla_config(case: dict[str, Any], num_layers: int) -> Any:
    from sla_megatron.attention.sla_config import SLAConfig

    return SLAConfig(
        num_layers=num_layers,
        num_query_groups=case["groups"],
        skip_distances=tuple(case["distances"]),
        num_skip_groups=case["skip_groups"],
        layers=tuple(case["layers"]) if "layers" in case else None,
        kv_projection=case["projection"],
        share=case.get("share", "kv"),
        source_layers=tuple(case.get("source_layers", ())),
    )


def reference_gpt(case: dict[str, Any], num_layers: int, kind: type | None = None) -> Any:
    """Of the case's model, or of another one: what ``mistake`` says of it is a mistake that a test is to find.

    ``kind`` is another model of those fields than a GPT.
    """
    from tests.reference import ReferenceGPT

    asked = case | case.get("mistake", {})
    return (kind or ReferenceGPT)(
        num_layers=num_layers,
        num_heads=HEADS,
        num_groups=asked["groups"],
        head_size=HEAD_SIZE,
        distances=tuple(asked["distances"]),
        num_skip_groups=asked["skip_groups"],
        consumer_layers=tuple(asked["layers"]) if "layers" in asked else None,
        pruned=asked["projection"] == "pruned",
        rope=asked["rope"],
        rotary_percent=asked.get("rotary_percent", 1.0),
        layers_without_rope=tuple(asked.get("layers_without_rope", ())),
        rms_norm=asked["rms_norm"],
        swiglu=asked.get("swiglu", False),
        pattern=asked.get("pattern", ""),
        output_gate=asked.get("output_gate", False),
        share=asked.get("share", "kv"),
        source_layers=tuple(asked.get("source_layers", ())),
    )


def transformer_config(case: dict[str, Any]) -> Any:
    import torch
    import torch.nn.functional as F
    from megatron.core.transformer import TransformerConfig

    from sla_megatron.cpu.flags import CONFIG_ON_CPU
    from tests.support import offloading

    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "selective-mlp": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
        "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "uniform2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
        "uniform3": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
        "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    }[case["recompute"]]
    pattern = case.get("pattern", "")
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": HIDDEN, "moe_aux_loss_coeff": 0.0}
    gated = {"activation_func": F.silu, "gated_linear_unit": True} if case.get("swiglu") else {}
    return TransformerConfig(
        num_layers=len(pattern) or LAYERS,
        is_hybrid_model=bool(pattern),
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=case["groups"],
        kv_channels=HEAD_SIZE,
        ffn_hidden_size=2 * HIDDEN,
        add_bias_linear=case.get("bias", True),
        add_qkv_bias=case.get("bias", True),
        qk_layernorm=case.get("qk_norm", False),
        attention_output_gate=case.get("output_gate", False),
        no_rope_freq=case.get("no_rope_freq"),
        normalization="RMSNorm" if case["rms_norm"] else "LayerNorm",
        layernorm_epsilon=1e-5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=case["tp"],
        context_parallel_size=case.get("cp", 1),
        cp_comm_type=case.get("cp_comm_type"),
        sequence_parallel=case["sequence_parallel"],
        bf16=case.get("bf16", False),
        params_dtype=torch.bfloat16 if case.get("bf16") else torch.float32,
        **offloading.FLAGS if case.get("offload") else {},
        **CONFIG_ON_CPU | {"transformer_impl": case.get("transformer_impl", "local")},
        **recompute,
        **gated,
        **experts if "E" in pattern else {},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), run_case)
