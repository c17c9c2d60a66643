"""Megatron's families of flags that work with ``--sla``, and the tests that show it; ``families.py`` has the others.

``docs/support.md`` is written from both by ``support_page.py``.  A test holds them against the checks of the flags and
the tests that there are.  Pure data.
"""

from __future__ import annotations

from .families import REFUSED, Family

# Tests that show several things.
_PARITY = "tests/test_parity.py::test_logits_and_every_gradient"
_SAME_TRAINING = "tests/test_trainer.py::test_same_training_however_it_is_run"
_BIT_FOR_BIT = "tests/test_trainer.py::test_bit_for_bit"
_IN_PIPELINES = "tests/test_pipeline.py::test_trains_as_without_a_pipeline"
_BYTES = "tests/test_pipeline.py::test_bytes_on_the_wire_are_the_lower_bound"
_PIPELINE_OPTIONS = "tests/test_pipeline_options.py::test_as_without_a_pipeline"
_HOWEVER = "tests/test_pipeline_options.py::test_however_it_is_run"

_HYBRID = (
    "tests/test_hybrid.py::test_is_the_gpt_whose_checkpoint_it_loads",
    "tests/test_hybrid.py::test_trains_as_without_a_pipeline",
    "tests/test_hybrid.py::test_bytes_on_the_wire_are_the_lower_bound",
)

# Flags that go with others.
_PP2 = "--pipeline-model-parallel-size 2"
_VPP = f"{_PP2} --num-virtual-stages-per-pipeline-rank 3 --global-batch-size 4"
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_MOE = "--num-experts 4 --moe-router-topk 2 --disable-bias-linear"
_SDPA, _TE = "--transformer-impl local --core-attention sdpa", "--transformer-impl transformer_engine"
_GRAPH = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"
_ALL_TO_ALL = f"{_MOE} --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
_OVERLAPPED = f"{_ALL_TO_ALL} --bf16 --overlap-moe-expert-parallel-comm"
_CONVERSATIONS = "--sft --tokenizer-type SFTTokenizer --tokenizer-model tokenizer --data-path conversations.jsonl"
_ROPE = "--position-embedding-type rope"
_GQA = "--group-query-attention --num-query-groups"

WORKS = (
    Family(
        "a GPT's shape: grouped queries, positions, norms, MLPs, biases or none",
        (
            f"{_GQA} 4 {_ROPE} --rotary-percent 0.5 --normalization RMSNorm --swiglu --disable-bias-linear",
            "--position-embedding-type learned_absolute --normalization LayerNorm --qk-layernorm",
            "--untie-embeddings-and-output-weights",
        ),
        (_PARITY,),
    ),
    Family(
        "skip-layer attention's own flags",
        (
            "--sla-skip-distance 6 9 10 --sla-num-skip-groups 7",
            "--sla-skip-distance 1 --sla-layers 4-12 --sla-kv-projection pruned",
            "--sla-share values --sla-source-layer 1 --sla-num-skip-groups 0.5",
            "--sla-share keys --sla-source-layer 1 5 --sla-layers 7-/2 --sla-kv-projection pruned",
        ),
        (_PARITY, _BIT_FOR_BIT),
        limits=(
            "--sla-skip-distance 0",
            "--sla-source-layer 3 --sla-skip-distance 3",
            "--sla-source-layer 13",
            "--sla-source-layer 6 --sla-layers 6-",
            "--sla-share queries",
            "--sla-num-skip-groups 13",
            "--sla-num-skip-groups 1.5",
            "--sla-skip-distance 1 2 --sla-num-skip-groups 1",
            "--sla-layers 9-12",
            "--sla-layers last",
            "--sla-layers 8-13",
            "--sla-kv-projection pruned --attention-output-gate",
            "--sla-kv-projection pruned --optimizer muon",
        ),
    ),
    Family(
        "scaled rotary embeddings",
        (f"{_ROPE} --use-rope-scaling --rope-scaling-factor 32",),
        ("tests/test_checkpoints.py::test_the_rope_scaling_factor_reaches_the_model",),
        limits=("--position-embedding-type mrope --mrope-section 1 1 2",),
    ),
    Family(
        "sliding windows, yarn's positions",
        (
            "--window-size 5,0 --window-attn-skip-freq 2",
            "--position-embedding-type yarn --rotary-scaling-factor 4.0 --yarn-original-max-position-embeddings 8",
        ),
        (_SAME_TRAINING,),
    ),
    Family(
        "attention by torch: `--core-attention sdpa`",
        (_SDPA,),
        (_SAME_TRAINING,),
        limits=(
            "--transformer-impl transformer_engine --core-attention sdpa",
            f"{_SDPA} --window-size 4,0",
            f"{_SDPA} --softmax-type learnable",
        ),
    ),
    Family(
        "context parallelism",
        (
            f"{_SDPA} --context-parallel-size 4",
            f"{_SDPA} --context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel {_PP2}",
            f"{_TE} --bf16 --context-parallel-size 2 --cp-comm-type a2a",
            f"{_TE} --bf16 --context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2",
        ),
        ("tests/test_context_parallel.py::test_logits_and_every_gradient", _IN_PIPELINES, _BYTES),
        ("tests/test_gpus.py::test_context_parallel",),
        limits=(
            "--transformer-impl local --context-parallel-size 2",
            f"{_SDPA} --context-parallel-size 2 --cp-comm-type a2a",
            f"{_SDPA} --context-parallel-size 4 --hierarchical-context-parallel-sizes 2 2",
            "--hybrid-context-parallel",
        ),
    ),
    Family(
        "tensor and sequence parallelism",
        ("--tensor-model-parallel-size 2 --sequence-parallel",),
        (_PARITY, _SAME_TRAINING),
        limits=(
            f"--tensor-model-parallel-size 2 {_GQA} 1",
            "--tensor-parallel-num-weight-shards 2",
            "--tensor-model-parallel-size 2 --sla-kv-projection pruned",
        ),
    ),
    Family(
        "data parallelism, the distributed optimizer, overlap of both",
        ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",),
        (_SAME_TRAINING,),
    ),
    Family(
        "sharded weights: torch's FSDP2",
        (
            "CUDA_DEVICE_MAX_CONNECTIONS=8 --use-torch-fsdp2 --no-gradient-accumulation-fusion "
            "--untie-embeddings-and-output-weights",
        ),
        ("tests/test_fsdp.py::test_trains_as_data_parallelism_does",),
        ("tests/test_gpus.py::test_fsdp2",),
        limits=("--use-megatron-fsdp",),
    ),
    Family(
        "pipelines: 1F1B, interleaved, uneven stages, custom layouts",
        (
            _PP2,
            _VPP,
            "--pipeline-model-parallel-size 3 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 3 "
            "--no-overlap-p2p-communication",
            f"{_PP2} --pipeline-model-parallel-layout E|t*9|ttt|L --global-batch-size 4",
            f"{_VPP} --overlap-p2p-communication-warmup-flush",
        ),
        (_IN_PIPELINES, _BYTES, _HOWEVER),
        limits=(
            f"{_PP2} --bf16 --fp32-residual-connection",
            f"{_PP2} --num-layers-per-virtual-pipeline-stage 3 --global-batch-size 3",
        ),
    ),
    Family(
        "recomputation: selective, full",
        ("--recompute-granularity selective --recompute-modules core_attn", _FULL),
        (_PARITY, _HOWEVER),
        limits=("--recompute-granularity selective --recompute-modules core_attn mlp",),
    ),
    Family(
        "activation offloading",
        (f"{_TE} --bf16 --fine-grained-activation-offloading --offload-modules core_attn attn_proj",),
        (_PARITY,),
        ("tests/test_gpu.py::test_reference",),
        limits=("--cpu-offloading-num-layers 2",),
    ),
    Family(
        "bf16 and fp16",
        ("--bf16", "--fp16 --initial-loss-scale 65536"),
        ("tests/test_trainer.py::test_bf16_stays_near_fp32", "tests/test_pipeline_options.py::test_half_precision"),
    ),
    Family(
        "fp8 and fp4, with full recomputation too",
        (
            f"{_TE} --bf16 --fp8-format hybrid --fp8-recipe delayed",
            f"{_TE} --bf16 --fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16 {_FULL}",
            f"{_TE} --bf16 --fp8-format e4m3 --fp8-recipe mxfp8 {_FULL}",
        ),
        ("tests/unit/model/test_recomputation_fp8.py::test_contexts_are_upstreams",),
        ("tests/test_gpu.py::test_full_recomputation_in_fp8",),
        limits=(f"{_TE} --bf16 --fp8-format hybrid --sla-kv-projection pruned",),
    ),
    Family(
        "a step as one CUDA graph",
        (_GRAPH, f"{_GRAPH} {_VPP}"),
        ("tests/test_cuda_graph.py::test_replays_are_steps",),
        ("tests/test_gpu.py::test_a_step_as_a_cuda_graph", "tests/test_gpus.py::test_a_pipelines_step_as_a_cuda_graph"),
        limits=(
            "--cuda-graph-impl local",
            "--enable-cuda-graph",
            "--external-cuda-graph",
            f"{_GRAPH} --cuda-graph-warmup-steps 0",
            f"{_GRAPH} {_PP2}",
            f"{_GRAPH} {_TE} --dataloader-inter-document-masking",
        ),
    ),
    Family(
        "experts: over ranks, every dispatcher, shared ones",
        (
            f"{_MOE} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 {_PP2}",
            f"{_ALL_TO_ALL} {_VPP}",
            f"{_MOE} --expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
            f"{_MOE} --moe-shared-expert-intermediate-size 48",
        ),
        (_PIPELINE_OPTIONS, "tests/test_experts.py::test_as_with_all_experts_on_every_rank"),
    ),
    Family(
        "experts' exchange overlapped with another microbatch's backward pass",
        (_OVERLAPPED, f"{_OVERLAPPED} {_TE} --delay-wgrad-compute"),
        ("tests/test_experts.py::test_overlapped_with_another_microbatchs_backward_pass",),
        ("tests/test_gpus.py::test_experts_overlapped",),
        limits=(f"{_OVERLAPPED} {_PP2} --pipeline-model-parallel-layout Et*6||t*6|L --global-batch-size 4",),
    ),
    Family(
        "layers that predict further tokens",
        (
            f"{_ROPE} --mtp-num-layers 1",
            f"{_ROPE} --mtp-num-layers 1 --untie-embeddings-and-output-weights {_VPP}",
        ),
        ("tests/test_further_tokens.py::test_as_without_a_pipeline",),
    ),
    Family(
        "layers without rotary embedding",
        (f"{_ROPE} --no-rope-freq 3",),
        (_PARITY,),
        limits=(f"{_ROPE} --no-rope-freq 4",),
    ),
    Family(
        "documents kept apart by a mask",
        (f"{_SDPA} --reset-attention-mask --reset-position-ids --eod-mask-loss",),
        ("tests/test_pipeline.py::test_every_stage_keeps_documents_apart",),
    ),
    Family(
        "documents kept apart without a mask",
        (
            f"{_SDPA} --dataloader-inter-document-masking --eod-mask-loss {_VPP}",
            f"{_SDPA} --dataloader-inter-document-masking --context-parallel-size 2 --calculate-per-token-loss",
            f"{_TE} --dataloader-inter-document-masking",
        ),
        (
            "tests/test_context_parallel.py::test_logits_and_every_gradient",
            "tests/test_pipeline.py::test_packed_documents_train_as_masked_ones",
        ),
        ("tests/test_gpu.py::test_documents_in_one_sample",),
        limits=(
            "--transformer-impl local --dataloader-inter-document-masking",
            f"{_TE} --dataloader-inter-document-masking --micro-batch-size 2 {_PP2} --global-batch-size 4",
            f"{_TE} --dataloader-inter-document-masking --context-parallel-size 2",
            f"{_SDPA} --dataloader-inter-document-masking {_ROPE} --mtp-num-layers 1",
        ),
    ),
    Family(
        "fine-tuning on conversations",
        (f"{_SDPA} {_CONVERSATIONS} {_PP2}", f"{_TE} {_CONVERSATIONS} --no-create-attention-mask-in-dataloader"),
        (_PIPELINE_OPTIONS,),
        limits=("--sft",),
    ),
    Family(
        "data, tokenizers",
        (
            "--data-path corpus_text_document --split 90,10,0 --data-cache-path cache",
            "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer",
        ),
        (
            "tests/test_data.py::test_megatron_reads_every_document_back",
            "tests/test_carried_tokenizer.py::test_training_carries_its_tokenizer",
        ),
    ),
    Family(
        "optimizers and their schedules: Adam, SGD",
        (
            "--optimizer adam --adam-beta2 0.95 --lr-decay-style cosine",
            "--optimizer sgd --sgd-momentum 0.9 --weight-decay 0.1 --lr-decay-style linear --min-lr 1e-4",
        ),
        (_SAME_TRAINING,),
    ),
    Family(
        "batches that grow, skipped steps, loss a token, other microbatches in evaluation",
        (
            "--step-batch-size-schedule 0:4",
            "--iterations-to-skip 2",
            "--calculate-per-token-loss",
            "--eval-global-batch-size 16 --eval-micro-batch-size 2",
        ),
        (_PIPELINE_OPTIONS,),
    ),
    Family(
        "dropout, random numbers",
        ("--attention-dropout 0.1 --hidden-dropout 0.1 --seed 7",),
        (_BIT_FOR_BIT, "tests/test_pipeline_options.py::test_dropout_repeats_bit_for_bit"),
    ),
    Family(
        "checkpoints: torch_dist, resharded, other settings, going on after SIGKILL",
        (
            "--save checkpoints --save-interval 1 --load checkpoints",
            "--dist-ckpt-optim-fully-reshardable --use-distributed-optimizer",
        ),
        (
            "tests/test_checkpoints.py::test_resumes_at_every_size",
            "tests/test_pipeline_checkpoints.py::test_goes_on_in_another_layout",
            "tests/test_resume.py::test_sigkill_between_saves",
        ),
    ),
    Family(
        "hybrid models of attention, MLP and expert layers",
        (
            "--hybrid-layer-pattern *-*-*-*-",
            f"--hybrid-layer-pattern=-*|*-|**|-* {_PP2} --global-batch-size 4",
            f"--hybrid-layer-pattern *-*-|--|-*|*- {_FULL} --pipeline-model-parallel-size 4 --global-batch-size 4",
            f"--hybrid-layer-pattern *E*-*E*- {_ALL_TO_ALL} {_PP2}",
            "--hybrid-layer-pattern *-*-*-*- --tensor-model-parallel-size 2 --sequence-parallel",
        ),
        _HYBRID,
        limits=(
            "--hybrid-layer-pattern *-D-",
            "--hybrid-override-pattern *-+-",
            "--hybrid-layer-pattern=--E-",
            "--hybrid-override-pattern=----",
            f"--hybrid-layer-pattern *-*- {_TE} --qk-layernorm",
            f"--hybrid-layer-pattern *-*- {_ROPE} --use-rope-scaling",
            f"--hybrid-layer-pattern *-*-/*- {_ROPE}",
            "--hybrid-layer-pattern *-|*-",
            f"--hybrid-layer-pattern *-*-* {_PP2}",
            f"--hybrid-layer-pattern *E*E {_OVERLAPPED}",
            "CUDA_DEVICE_MAX_CONNECTIONS=8 --hybrid-layer-pattern *-*- --use-torch-fsdp2 "
            "--no-gradient-accumulation-fusion --untie-embeddings-and-output-weights",
            "--hybrid-layer-pattern *-*- --inprocess-restart",
            f"--hybrid-layer-pattern *-*- {_GRAPH}",
            f"--hybrid-layer-pattern *-*- {_TE} --fine-grained-activation-offloading --offload-modules attn_proj",
        ),
    ),
    Family(
        "hybrid models with Mamba layers, or with gated delta networks, of which no test runs one",
        (
            "--hybrid-layer-pattern M*-M*- --mamba-num-heads 8 --bf16",
            "--hybrid-layer-pattern GG*-|GG*- --pipeline-model-parallel-size 2",
        ),
        (),
        ("tests/test_gpu.py::test_hybrid_with_mamba",),
    ),
    Family(
        "restart in the process",
        ("--inprocess-restart",),
        ("tests/test_restart.py::test_a_fresh_run_is_as_if_nothing_had_been",),
        ("tests/test_gpus.py::test_inprocess_restart",),
    ),
    Family(
        "logging, timers, checks of weights",
        (
            "--log-params-norm --log-num-zeros-in-grad --log-throughput --timing-log-level 2",
            "--manual-gc --manual-gc-interval 2 --check-weight-hash-across-dp-replicas-interval 2",
        ),
        (_BIT_FOR_BIT,),
    ),
)

#: All of them, in the page's order.
FAMILIES = (*WORKS, *REFUSED)
