"""Command lines that are refused and command lines that are accepted, for ``test_validation.py``."""

from __future__ import annotations

from sla_megatron.attention.sla_config import SLAConfig

#: A model of 12 layers and 12 heads; wherever something could be written, it would be in the current folder.
MODEL = (
    "--num-layers 12 --hidden-size 48 --num-attention-heads 12 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 255 --save checkpoints --save-interval 1 --tensorboard-dir tensorboard "
    "--data-cache-path cache"
)
GQA4 = "--group-query-attention --num-query-groups 4"
INTEGERS, RANGES = "one or more integers >= 1", "layers within 1-12"
SHARE = "or a share such as 0.5"
PRUNED2 = "--sla --sla-kv-projection pruned --tensor-model-parallel-size 2"
DIVISIBLE = "full, or live K/V groups that are divisible by TP"


#: What is refused: command line, how many ranks it is for, what the line says.
BAD: list[tuple[str, int, tuple[str, ...]]] = [
    ("--sla --sla-skip-distance 0", 1, ("--sla-skip-distance 0:", INTEGERS)),
    ("--sla --sla-skip-distance -3", 1, ("--sla-skip-distance -3:", INTEGERS)),
    ("--sla --sla-skip-distance 2.5", 1, ("--sla-skip-distance 2.5:", INTEGERS)),
    ("--sla --sla-skip-distance nine", 1, ("--sla-skip-distance nine:", INTEGERS)),
    ("--sla --sla-skip-distance 3 0", 1, ("--sla-skip-distance 3 0:", INTEGERS)),
    ("--sla --sla-skip-distance", 1, ("--sla-skip-distance", INTEGERS)),
    (
        "--sla --sla-skip-distance 1 2 3 --sla-num-skip-groups 2",
        1,
        ("--sla-skip-distance 1 2 3:", "skip groups, 2"),
    ),
    (
        "--sla --sla-skip-distance 1 2 --sla-num-skip-groups 0",
        1,
        ("--sla-skip-distance 1 2:", "skip groups, 0"),
    ),
    ("--sla --sla-num-skip-groups -1", 1, ("--sla-num-skip-groups -1:", "an integer from 0 to 12")),
    ("--sla --sla-num-skip-groups 13", 1, ("--sla-num-skip-groups 13:", "an integer from 0 to 12")),
    (f"--sla --sla-num-skip-groups 5 {GQA4}", 1, ("--sla-num-skip-groups 5:", "an integer from 0 to 4")),
    ("--sla --sla-num-skip-groups 1.5", 1, ("--sla-num-skip-groups 1.5:", "an integer")),
    ("--sla --sla-num-skip-groups", 1, ("--sla-num-skip-groups", "an integer")),
    ("--sla --sla-layers 0", 1, ("--sla-layers 0:", RANGES)),
    ("--sla --sla-layers 8-13", 1, ("--sla-layers 8-13:", RANGES)),
    ("--sla --sla-layers 12-10", 1, ("--sla-layers 12-10:", RANGES)),
    ("--sla --sla-layers a-b", 1, ("--sla-layers a-b:", RANGES)),
    ("--sla --sla-layers=", 1, ("--sla-layers", RANGES)),
    ("--sla --sla-layers", 1, ("--sla-layers", "10-12")),
    ("--sla --sla-layers 9-12", 1, ("--sla-layers 9-12:", "beyond the distance 9: 10-12")),
    (
        "--sla --sla-layers 2-4 --sla-skip-distance 2 4",
        1,
        ("--sla-layers 2-4:", "beyond the distance 2: 3-12"),
    ),
    ("--sla --sla-layers 12 --sla-skip-distance 12", 1, ("--sla-layers 12:", "no --sla-layers")),
    # Shares of the layers and of the groups have a decimal point.
    ("--sla --sla-skip-distance 0.0", 1, ("--sla-skip-distance 0.0:", INTEGERS, SHARE)),
    ("--sla --sla-skip-distance 3 1.01", 1, ("--sla-skip-distance 1.01:", INTEGERS, SHARE)),
    ("--sla --sla-skip-distance 1e-1", 1, ("--sla-skip-distance 1e-1:", INTEGERS)),
    ("--sla --sla-num-skip-groups 12.0", 1, ("--sla-num-skip-groups 12.0:", "an integer", SHARE)),
    ("--sla --sla-num-skip-groups -0.5", 1, ("--sla-num-skip-groups -0.5:", "an integer", SHARE)),
    ("--sla --sla-num-skip-groups half.", 1, ("--sla-num-skip-groups half.:", "an integer")),
    ("--sla --sla-skip-distance 1.0 --sla-layers 12", 1, ("--sla-layers 12:", "no --sla-layers")),
    ("--sla --sla-layers 2-/0", 1, ("--sla-layers 2-/0:", RANGES)),
    ("--sla --sla-layers 2/2", 1, ("--sla-layers 2/2:", RANGES)),
    ("--sla --sla-layers 13-", 1, ("--sla-layers 13-:", RANGES)),
    ("--sla --sla-layers 9-/2", 1, ("--sla-layers 9-/2:", "beyond the distance 9: 10-12")),
    # Source layers.
    ("--sla --sla-source-layer 0", 1, ("--sla-source-layer 0:", "one or more layers within 1-12")),
    ("--sla --sla-source-layer 1 13", 1, ("--sla-source-layer 1 13:", "one or more layers within 1-12")),
    ("--sla --sla-source-layer", 1, ("--sla-source-layer", "one or more layers within 1-12")),
    ("--sla --sla-source-layer first", 1, ("--sla-source-layer first:", "one or more layers, counted from 1")),
    ("--sla --sla-source-layer 1.5", 1, ("--sla-source-layer 1.5:", "counted from 1", SHARE)),
    (
        "--sla --sla-source-layer 1 --sla-skip-distance 9",
        1,
        ("--sla-source-layer 1:", "no --sla-skip-distance beside it"),
    ),
    (
        "--sla --sla-source-layer 1 2 3 --sla-num-skip-groups 2",
        1,
        ("--sla-source-layer 1 2 3:", "at most as many source layers as skip groups, 2"),
    ),
    (
        "--sla --sla-source-layer 6 3 --sla-layers 3-12",
        1,
        ("--sla-layers 3-12:", "beyond the source layer 3: 4-12"),
    ),
    ("--sla --sla-source-layer 12 --sla-layers 12", 1, ("--sla-layers 12:", "no --sla-layers")),
    (
        "--sla --hybrid-layer-pattern *-*-*-*- --sla-source-layer 5",
        1,
        ("--sla-source-layer 5:", "one or more layers within 1-4"),
    ),
    # What is shared.
    ("--sla --sla-share k", 1, ("--sla-share k:", "kv or values or keys")),
    ("--sla --sla-share", 1, ("--sla-share", "kv or values or keys")),
    (
        f"{PRUNED2} --sla-share values",
        2,
        ("--sla-kv-projection pruned:", "live values that are divisible by TP", "layer 10 has 3, 2+1 on the 2"),
    ),
    (
        f"{PRUNED2} --sla-share keys --sla-source-layer 1 2 --sla-num-skip-groups 6",
        2,
        ("--sla-kv-projection pruned:", "live keys that are divisible by TP", "layer 2 has 9, 4+5 on the 2"),
    ),
    ("--sla --sla-kv-projection none", 1, ("--sla-kv-projection none:", "full or pruned")),
    ("--sla --sla-kv-projection", 1, ("--sla-kv-projection", "full or pruned")),
    (
        "--sla --sla-kv-projection pruned --attention-output-gate",
        1,
        ("--sla-kv-projection pruned:", "full with"),
    ),
    ("--sla --sla-kv-projection pruned --optimizer muon", 1, ("--optimizer muon:", "adam or sgd")),
    (
        "--sla --sla-kv-projection pruned --tensor-model-parallel-size 2",
        2,
        ("--sla-kv-projection pruned:", DIVISIBLE, "layer 10 has 3, 2+1 on the 2"),
    ),
    (
        "--sla --tensor-model-parallel-size 8",
        8,
        ("--tensor-model-parallel-size 8:", "divisor of the 12 K/V groups"),
    ),
    (
        "--num-experts 4 --disable-bias-linear --expert-model-parallel-size 4 --pipeline-model-parallel-size 2",
        4,
        ("--expert-model-parallel-size 4:", "divides the processes"),
    ),
    (
        "--sla --tensor-model-parallel-size 2 --group-query-attention --num-query-groups 1",
        2,
        ("--tensor-model-parallel-size 2:", "divisor of the 1 K/V groups"),
    ),
    (
        "--sla --tensor-parallel-num-weight-shards 2",
        2,
        ("--tensor-parallel-num-weight-shards 2:", "1 with --sla"),
    ),
    ("--sla --context-parallel-size 2", 2, ("--context-parallel-size 2:", "--core-attention sdpa beside it, or")),
    ("--sla --multi-latent-attention", 1, ("--multi-latent-attention True:", "no multi-latent attention")),
    (
        "--sla --hybrid-layer-pattern *-*-*-*- --sla-layers 4-5",
        1,
        ("--sla-layers 4-5:", "layers within 1-4 (attention layers of *-*-*-*-)"),
    ),
    (
        "--sla --position-embedding-type rope --hybrid-layer-pattern *-*-*-*- --no-rope-freq ([0]*6+[1]*2)",
        1,
        ("--no-rope-freq 0 0 0 0 0 0 1 1:", "layer 4 reads layer 1's"),
    ),
    (
        "--hybrid-layer-pattern -*-*",
        1,
        ("--hybrid-layer-pattern", "begins with - behind an =, --hybrid-layer-pattern=-*"),
    ),
    (
        "--sla --hybrid-layer-pattern *-*-*-*- --sla-layers 3 --sla-skip-distance 3",
        1,
        ("--sla-layers 3:", "beyond the distance 3: 4-4"),
    ),
    ("--sla --linear-attention-freq 2", 1, ("--linear-attention-freq 2:", "no linear attention")),
    (
        "--sla --experimental-attention-variant dsa",
        1,
        ("--experimental-attention-variant dsa:", "no experimental"),
    ),
    (
        "--sla --position-embedding-type rope --no-rope-freq 4",
        1,
        ("--no-rope-freq 4:", "in both or in neither", "layer 12 reads layer 3's"),
    ),
    (
        "--sla --position-embedding-type rope --no-rope-freq 4 --sla-source-layer 1 --sla-share keys",
        1,
        ("--no-rope-freq 4:", "in both or in neither", "layer 4 reads layer 1's"),
    ),
    (
        "--sla --position-embedding-type rope --no-rope-freq ([0]*2+[1]*1)*4 --sla-skip-distance 3 1",
        1,
        ("--no-rope-freq 0 0 1 0", "layer 3 reads layer 2's"),
    ),
    ("--sla --cpu-offloading-num-layers 2", 1, ("--cpu-offloading-num-layers 2:", "0 with --sla")),
    (
        "--sla --recompute-granularity selective --recompute-modules core_attn mlp",
        1,
        ("--recompute-modules core_attn mlp:", "--disable-bias-linear"),
    ),
    ("--sla --cuda-graph-impl local", 1, ("--cuda-graph-impl local:", "none without a GPU")),
    ("--sla --enable-cuda-graph", 1, ("cuda-graph", "expected no")),
    ("--use-checkpoint-args", 1, ("--use-checkpoint-args", "--load or --pretrained-checkpoint")),
    # Settings without the flag that turns them on.
    ("--sla-skip-distance 3", 1, ("--sla-skip-distance 3:", "--sla beside it")),
    ("--sla-num-skip-groups 0", 1, ("--sla-num-skip-groups 0:", "--sla beside it")),
    ("--sla-layers 10-12", 1, ("--sla-layers 10-12:", "--sla beside it")),
    ("--sla-share kv", 1, ("--sla-share kv:", "--sla beside it")),
    ("--sla-source-layer 1", 1, ("--sla-source-layer 1:", "--sla beside it")),
    ("--sla-kv-projection full", 1, ("--sla-kv-projection full:", "--sla beside it")),
    # What upstream would refuse in a traceback of its own, were it asked first.
    ("--sla --qk-clip", 1, ("--qk-clip True:", "no --qk-clip")),
    ("--sla --perform-rl-step", 1, ("--perform-rl-step True:", "no reinforcement learning")),
    ("--fim-data", 1, ("--fim-data True:", "no --fim-data")),
    ("--hybrid-context-parallel", 1, ("--hybrid-context-parallel True:", "no --hybrid-context-parallel")),
    # Pipelines.
    (
        "--sla --pipeline-model-parallel-size 2 --bf16 --fp32-residual-connection",
        2,
        ("--fp32-residual-connection True:", "without a GPU"),
    ),
    (
        "--sla --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3 --global-batch-size 1",
        2,
        ("--global-batch-size 1:", "2 (pipeline size) <= 2 (microbatch group) <= 1 (microbatches)"),
    ),
    (
        "--sla --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3 --global-batch-size 3",
        2,
        ("--global-batch-size 3:", "leave a last group of 1"),
    ),
    (
        "--sla --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 4 "
        "--eval-global-batch-size 1",
        2,
        ("--eval-global-batch-size 1:", "<= 1 (microbatches)"),
    ),
    (
        "--sla --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*6||t*6|L --global-batch-size 8 "
        "--num-experts 4 --disable-bias-linear --bf16 --expert-model-parallel-size 2 "
        "--moe-token-dispatcher-type alltoall --overlap-moe-expert-parallel-comm",
        4,
        ("--pipeline-model-parallel-layout Et*6||t*6|L:", "a layer in each stage between others"),
    ),
    # What this entry point does not do, with --sla or without.
    ("--logits-load-dir logits", 1, ("--logits-load-dir logits:", "no --logits-load-dir")),
    ("--inprocess-restart", 1, ("--inprocess-restart True:", "nvidia-resiliency-ext")),
    ("--sla --inprocess-restart", 2, ("--inprocess-restart True:", "no --inprocess-restart without GPUs")),
    (
        "--per-dataset-sequences-path x",
        1,
        ("--per-dataset-sequences-path x:", "no --per-dataset-sequences-path"),
    ),
    (
        "--dataloader-inter-document-masking",
        1,
        ("--dataloader-inter-document-masking True:", "--core-attention sdpa beside it, or"),
    ),
]


#: Where upstream refuses first without a GPU, the refusal is checked on a good run's arguments.
SETTLED: dict[str, object] = {
    "qk_clip": True,
    "perform_rl_step": True,
    "heterogeneous_layers_config_path": "layers.json",
    "heterogeneous_layers_config_encoded_json": "{}",
    "use_megatron_fsdp": True,
    "cuda_graph_impl": "local",
    "transformer_impl": "inference_optimized",
    "hybrid_context_parallel": True,
    "enable_mhc_connections": True,
}


#: What is accepted: command line -> how many ranks it is for, and what the settings resolve to.
GOOD: dict[str, tuple[int, SLAConfig]] = {
    "--sla": (1, SLAConfig(12, 12, (9,), 9)),
    f"--sla {GQA4}": (1, SLAConfig(12, 4, (9,), 3)),
    "--sla --num-query-groups 4": (1, SLAConfig(12, 12, (9,), 9)),
    "--sla --num-layers 8 --num-attention-heads 8": (1, SLAConfig(8, 8, (6,), 6)),
    "--sla --sla-skip-distance 3": (1, SLAConfig(12, 12, (3,), 9)),
    "--sla --sla-skip-distance 6 9 10 --sla-num-skip-groups 7": (1, SLAConfig(12, 12, (6, 9, 10), 7)),
    "--sla --sla-skip-distance 12": (1, SLAConfig(12, 12, (12,), 9)),
    "--sla --sla-num-skip-groups 0": (1, SLAConfig(12, 12, (9,), 0)),
    "--sla --sla-num-skip-groups 12": (1, SLAConfig(12, 12, (9,), 12)),
    "--sla --sla-skip-distance 1 --sla-layers 4-12": (1, SLAConfig(12, 12, (1,), 9, tuple(range(4, 13)))),
    "--sla --sla-layers 12,10,10-11": (1, SLAConfig(12, 12, (9,), 9, (10, 11, 12))),
    "--sla --sla-skip-distance 2 4 --sla-layers 3": (1, SLAConfig(12, 12, (2, 4), 9, (3,))),
    "--sla --sla-kv-projection pruned": (1, SLAConfig(12, 12, (9,), 9, None, "pruned")),
    "--sla --sla-kv-projection pruned --tensor-model-parallel-size 3": (
        3,
        SLAConfig(12, 12, (9,), 9, None, "pruned"),
    ),
    f"--sla {GQA4} --tensor-model-parallel-size 4 --sequence-parallel": (4, SLAConfig(12, 4, (9,), 3)),
    "--sla --position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm": (
        1,
        SLAConfig(12, 12, (9,), 9),
    ),
    "--sla --recompute-granularity full --recompute-method block --recompute-num-layers 2": (
        1,
        SLAConfig(12, 12, (9,), 9),
    ),
    "--sla --position-embedding-type rope --no-rope-freq 3": (1, SLAConfig(12, 12, (9,), 9)),
    "--sla --pipeline-model-parallel-size 3": (3, SLAConfig(12, 12, (9,), 9)),
    "--sla --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3 --global-batch-size 4": (
        2,
        SLAConfig(12, 12, (9,), 9),
    ),
    "--sla --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E|t*9|ttt|L --global-batch-size 4": (
        2,
        SLAConfig(12, 12, (9,), 9),
    ),
    "--sla --position-embedding-type rope --mtp-num-layers 2": (1, SLAConfig(12, 12, (9,), 9)),
    "--sla --num-experts 4 --bf16 --use-distributed-optimizer --disable-bias-linear": (1, SLAConfig(12, 12, (9,), 9)),
    # Shares of the layers and of the groups, rounded as the defaults are.
    "--sla --sla-skip-distance 0.75 --sla-num-skip-groups 0.75": (1, SLAConfig(12, 12, (9,), 9)),
    "--sla --sla-skip-distance 0.01 1. --sla-num-skip-groups 0.2": (1, SLAConfig(12, 12, (1, 12), 2)),
    f"--sla --sla-num-skip-groups .1 {GQA4}": (1, SLAConfig(12, 4, (9,), 1)),
    "--sla --sla-layers 10-": (1, SLAConfig(12, 12, (9,), 9, (10, 11, 12))),
    # Named settings.
    "--sla --sla-share values": (1, SLAConfig(12, 12, (9,), 9, share="values")),
    "--sla --sla-share keys": (1, SLAConfig(12, 12, (9,), 9, share="keys")),
    "--sla --sla-share values --sla-source-layer 1 --sla-num-skip-groups 0.5": (
        1,
        SLAConfig(12, 12, (), 6, share="values", source_layers=(1,)),
    ),
    f"--sla --sla-skip-distance 1 --sla-num-skip-groups 1.0 --sla-layers 2-/2 {GQA4}": (
        1,
        SLAConfig(12, 4, (1,), 4, (2, 4, 6, 8, 10, 12)),
    ),
    "--sla --sla-source-layer 0.5 --sla-num-skip-groups 1.0": (1, SLAConfig(12, 12, (), 12, source_layers=(6,))),
    # The last layer as a source is read by none, as a distance beyond the last layer is.
    "--sla --sla-source-layer 3 12 --sla-layers 8-10": (1, SLAConfig(12, 12, (), 9, (8, 9, 10), source_layers=(3, 12))),
    f"{PRUNED2} --sla-source-layer 1 --sla-num-skip-groups 0.5 --sla-share keys": (
        2,
        SLAConfig(12, 12, (), 6, None, "pruned", "keys", (1,)),
    ),
    # Only keys are rotated.
    "--sla --position-embedding-type rope --no-rope-freq 4 --sla-source-layer 1 --sla-share values": (
        1,
        SLAConfig(12, 12, (), 9, share="values", source_layers=(1,)),
    ),
    "--sla --hybrid-layer-pattern *-*-*-*- --sla-source-layer 0.5 --sla-layers 3-": (
        1,
        SLAConfig(4, 12, (), 9, (3, 4), source_layers=(2,)),
    ),
    # Of a hybrid model the attention layers count, and --num-layers does not.
    "--sla --hybrid-layer-pattern *-*-*-*-": (1, SLAConfig(4, 12, (3,), 9)),
    "--sla --hybrid-override-pattern **--*": (1, SLAConfig(3, 12, (2,), 9)),
    "--sla --hybrid-layer-pattern=-*|*-|**|-* --global-batch-size 2 --pipeline-model-parallel-size 2 "
    "--sla-skip-distance 1 --sla-layers 3-5": (
        2,
        SLAConfig(5, 12, (1,), 9, (3, 4, 5)),
    ),
    "--sla --sla-kv-projection pruned --hybrid-layer-pattern *-*-*-*-": (1, SLAConfig(4, 12, (3,), 9, None, "pruned")),
    # Layer 4 is an MLP: attention layers 1 and 4 are layers 1 and 7.
    "--sla --position-embedding-type rope --hybrid-layer-pattern *-*-*-*- --no-rope-freq ([0]*3+[1]+[0]*4)": (
        1,
        SLAConfig(4, 12, (3,), 9),
    ),
}
