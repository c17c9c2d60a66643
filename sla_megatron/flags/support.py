"""Megatron's families of flags: what works with ``--sla`` and which test shows it, and what is refused.

``docs/support.md`` is written from this table by ``support_page.py``.  A test holds it against the checks of the flags
and the tests that there are.  Why something is refused is not here: the refusal says so itself.  Pure data.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Flags that a user turns on for one purpose.

    Attributes:
        name: the purpose.
        flags: command lines, each of which turns it on; variables of the environment, ``NAME=value``, come first.
        tests: ``file::function``, which show that it works.
        gpu_checks: the same of what only a GPU can show, and no GPU has yet.
        limits: command lines of the family that are refused; where nothing of it works, these are ``flags``.
    """

    name: str
    flags: tuple[str, ...]
    tests: tuple[str, ...] = ()
    gpu_checks: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    @property
    def is_refused(self) -> bool:
        """Whether nothing of it works."""
        return not (self.tests or self.gpu_checks)

    @property
    def accepted(self) -> tuple[str, ...]:
        """Command lines that are accepted beside ``--sla``."""
        return () if self.is_refused else self.flags

    @property
    def refused(self) -> tuple[str, ...]:
        """Command lines that are refused beside ``--sla``."""
        return self.flags if self.is_refused else self.limits


#: Flags that a Megatron of this project's range lacks: it has them from 0.20 on.
FROM_0_20 = ("--enable-mhc-connections",)

_PP2 = "--pipeline-model-parallel-size 2"
_VPP = f"{_PP2} --num-virtual-stages-per-pipeline-rank 3 --global-batch-size 4"
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_MOE = "--num-experts 4 --moe-router-topk 2 --disable-bias-linear"
_SDPA = "--transformer-impl local --core-attention sdpa"
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
        ("tests/test_parity.py::test_logits_and_every_gradient",),
    ),
    Family(
        "skip-layer attention's own flags",
        (
            "--sla-skip-distance 6 9 10 --sla-num-skip-groups 7",
            "--sla-skip-distance 1 --sla-layers 4-12 --sla-kv-projection pruned",
        ),
        ("tests/test_parity.py::test_logits_and_every_gradient", "tests/test_trainer.py::test_bit_for_bit"),
        limits=(
            "--sla-skip-distance 0",
            "--sla-num-skip-groups 13",
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
        ("tests/test_trainer.py::test_same_training_however_it_is_run",),
    ),
    Family(
        "attention by torch: `--core-attention sdpa`",
        (_SDPA,),
        ("tests/test_trainer.py::test_same_training_however_it_is_run",),
        limits=(
            "--transformer-impl transformer_engine --core-attention sdpa",
            f"{_SDPA} --context-parallel-size 2",
            f"{_SDPA} --window-size 4,0",
            f"{_SDPA} --softmax-type learnable",
        ),
    ),
    Family(
        "tensor and sequence parallelism",
        ("--tensor-model-parallel-size 2 --sequence-parallel",),
        (
            "tests/test_parity.py::test_logits_and_every_gradient",
            "tests/test_trainer.py::test_same_training_however_it_is_run",
        ),
        limits=(
            f"--tensor-model-parallel-size 2 {_GQA} 1",
            "--tensor-parallel-num-weight-shards 2",
            "--tensor-model-parallel-size 2 --sla-kv-projection pruned",
        ),
    ),
    Family(
        "data parallelism, the distributed optimizer, overlap of both",
        ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",),
        ("tests/test_trainer.py::test_same_training_however_it_is_run",),
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
        (
            "tests/test_pipeline.py::test_trains_as_without_a_pipeline",
            "tests/test_pipeline.py::test_bytes_on_the_wire_are_the_lower_bound",
            "tests/test_pipeline_options.py::test_however_it_is_run",
        ),
        limits=(
            f"{_PP2} --bf16 --fp32-residual-connection",
            f"{_PP2} --num-layers-per-virtual-pipeline-stage 3 --global-batch-size 3",
        ),
    ),
    Family(
        "recomputation: selective, full",
        ("--recompute-granularity selective --recompute-modules core_attn", _FULL),
        (
            "tests/test_parity.py::test_logits_and_every_gradient",
            "tests/test_pipeline_options.py::test_however_it_is_run",
        ),
        limits=(
            "--recompute-granularity selective --recompute-modules core_attn mlp",
            f"{_FULL} --bf16 --fp8-format hybrid",
        ),
    ),
    Family(
        "bf16 and fp16",
        ("--bf16", "--fp16 --initial-loss-scale 65536"),
        ("tests/test_trainer.py::test_bf16_stays_near_fp32", "tests/test_pipeline_options.py::test_half_precision"),
    ),
    Family(
        "experts",
        (_MOE, f"{_MOE} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 {_PP2}"),
        (
            "tests/test_trainer.py::test_trains_and_evaluates",
            "tests/test_pipeline_options.py::test_as_without_a_pipeline",
        ),
    ),
    Family(
        "documents kept apart by a mask",
        (f"{_SDPA} --reset-attention-mask --eod-mask-loss",),
        ("tests/test_pipeline.py::test_every_stage_keeps_documents_apart",),
        limits=("--dataloader-inter-document-masking", "--hybrid-context-parallel"),
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
        ("tests/test_trainer.py::test_same_training_however_it_is_run",),
    ),
    Family(
        "batches that grow, skipped steps, loss a token, other microbatches in evaluation",
        (
            "--step-batch-size-schedule 0:4",
            "--iterations-to-skip 2",
            "--calculate-per-token-loss",
            "--eval-global-batch-size 16 --eval-micro-batch-size 2",
        ),
        ("tests/test_pipeline_options.py::test_as_without_a_pipeline",),
    ),
    Family(
        "dropout, random numbers",
        ("--attention-dropout 0.1 --hidden-dropout 0.1 --seed 7",),
        (
            "tests/test_trainer.py::test_bit_for_bit",
            "tests/test_pipeline_options.py::test_dropout_repeats_bit_for_bit",
        ),
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
        limits=("--inprocess-restart",),
    ),
    Family(
        "logging, timers, checks of weights",
        (
            "--log-params-norm --log-num-zeros-in-grad --log-throughput --timing-log-level 2",
            "--manual-gc --manual-gc-interval 2 --check-weight-hash-across-dp-replicas-interval 2",
        ),
        ("tests/test_trainer.py::test_bit_for_bit",),
    ),
)

#: At most five: a test counts.
REFUSED = (
    Family(
        "layers of another kind",
        (
            "--multi-latent-attention --q-lora-rank 8",
            "--linear-attention-freq 2",
            "--experimental-attention-variant dsa",
            f"{_ROPE} --no-rope-freq 4",
            "--qk-clip",
            "--heterogeneous-layers-config-path layers.json",
            "--heterogeneous-layers-config-encoded-json {}",
            "--hybrid-layer-pattern M*M*",
            "--mtp-num-layers 1",
            "--enable-mhc-connections",
        ),
    ),
    Family(
        "activation offloading",
        ("--fine-grained-activation-offloading", "--cpu-offloading-num-layers 2"),
    ),
    Family(
        "layers that are run, or sharded, from outside of their block",
        (
            "--cuda-graph-impl local",
            "--enable-cuda-graph",
            "--external-cuda-graph",
            "--overlap-moe-expert-parallel-comm",
            "--delay-wgrad-compute",
            "--use-megatron-fsdp",
            "--use-torch-fsdp2",
        ),
    ),
    Family(
        "Megatron-side generation, reinforcement learning",
        ("--perform-rl-step", "--transformer-impl inference_optimized"),
    ),
    Family(
        "what is no pretraining of a GPT on text",
        (
            "--sft",
            "--fim-data",
            "--logits-load-dir logits",
            "--per-dataset-sequences-path sequences.json",
            "--dataloader-type external",
            "--titles-data-path titles",
            "--vision-pretraining",
        ),
    ),
)

FAMILIES = (*WORKS, *REFUSED)

#: Groups of Megatron's parser of which no row has a flag, by their titles.
UNTESTED = (
    "profiling",
    "autoresume",
    "straggler",
    "workload inspector",
    "inference",
    "Transformer-Engine",
    "one logger",
    "ft_package",
    "rerun engine",
    "msc",
    "fault injector",
)
