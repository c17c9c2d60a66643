"""Those of Megatron's flags that mean something to a plan of a GPT, for where Megatron is not installed.  Pure Python.

A test holds names, types, defaults and attributes against Megatron's own parser.  What is in no table is refused: only
Megatron can say what it means.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import takewhile

from ...common.errors import StartError
from ...common.flag_types import OneLineParser, number, unknown_flag
from ...cpu.device import add_device_arg, require_device_name
from ...flags.sla_flags import MEGATRON, add_sla_args
from ...upstream.megatron_version import INSTALL
from .flags import add_plan_args

#: Megatron's default -> integers of 1 or more that have it.
_COUNTS = {
    None: """
        num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels seq-length max-position-embeddings
        vocab-size padded-vocab-size micro-batch-size global-batch-size recompute-num-layers
        num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank
        decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
        microbatch-group-size-per-virtual-pipeline-stage
        num-experts moe-ffn-hidden-size moe-shared-expert-intermediate-size expert-tensor-parallel-size
    """,
    1: """
        num-query-groups tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size
        expert-model-parallel-size
    """,
    2: "moe-router-topk",
    128: "make-vocab-size-divisible-by",
}
#: What is taken, Megatron's default first; of some Megatron knows more.
_CHOICES = {
    "normalization": ("LayerNorm", "RMSNorm"),
    "position-embedding-type": ("learned_absolute", "rope", "none"),
    "tokenizer-type": (None, "GPT2BPETokenizer", "NullTokenizer", "HuggingFaceTokenizer", "GPTSentencePieceTokenizer"),
    "recompute-granularity": (None, "full", "selective"),
    "recompute-method": (None, "uniform", "block"),
    "optimizer": ("adam", "sgd"),
    "transformer-impl": ("transformer_engine", "local"),
}
_SWITCHES = """
    group-query-attention swiglu add-qkv-bias qk-layernorm bf16 fp16 untie-embeddings-and-output-weights
    sequence-parallel account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split
    overlap-p2p-communication-warmup-flush recompute-activations
"""
#: Switches that turn something off.
_OFF_SWITCHES = ("disable-bias-linear", "no-overlap-p2p-communication")
#: Attributes that are not named as the flag is.
_NAMED = {
    "disable-bias-linear": "add_bias_linear",
    "no-overlap-p2p-communication": "overlap_p2p_comm",
    "overlap-p2p-communication-warmup-flush": "overlap_p2p_comm_warmup_flush",
    "microbatch-group-size-per-virtual-pipeline-stage": "microbatch_group_size_per_vp_stage",
}
#: What changes no figure and is passed over, with a value and without.
_PASSED_OVER = """
    train-iters train-samples lr min-lr lr-decay-style lr-decay-iters lr-warmup-iters lr-warmup-fraction weight-decay
    clip-grad adam-beta1 adam-beta2 adam-eps seed init-method-std attention-dropout hidden-dropout norm-epsilon
    rotary-base rotary-percent log-interval eval-interval eval-iters save save-interval split tokenizer-model
    data-cache-path num-workers tensorboard-dir distributed-timeout-minutes
    moe-router-load-balancing-type moe-aux-loss-coeff moe-token-dispatcher-type moe-z-loss-coeff
"""
_SWITCHES_PASSED_OVER = """
    use-distributed-optimizer overlap-grad-reduce overlap-param-gather dist-ckpt-optim-fully-reshardable mock-data
    no-create-attention-mask-in-dataloader moe-grouped-gemm
"""


def add_known_flags(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of the tables to ``parser`` and return it."""
    for default, names in _COUNTS.items():
        for name in names.split():
            flag = f"--{name}"
            to = number(flag, int, "an integer >= 1")
            parser.add_argument(flag, type=to, default=default, dest=_attribute(name), metavar="N")
    for name, (default, *others) in _CHOICES.items():
        choices = [default, *others] if default else others
        parser.add_argument(f"--{name}", choices=choices, default=default, dest=_attribute(name))
    for name in (*_SWITCHES.split(), *_OFF_SWITCHES):
        action = "store_false" if name in _OFF_SWITCHES else "store_true"
        parser.add_argument(f"--{name}", action=action, dest=_attribute(name))
    for name in _PASSED_OVER.split():
        parser.add_argument(f"--{name}", default=SUPPRESS)
    for name in _SWITCHES_PASSED_OVER.split():
        parser.add_argument(f"--{name}", action="store_true", default=SUPPRESS)
    return parser


def parsed(argv: Sequence[str]) -> Namespace:
    """The flags in ``argv``: these, ``sla-plan``'s and ``--sla``.

    Raises:
        FlagError: for a value that cannot be.
        StartError: for a flag that is not known here.
    """
    parser = OneLineParser("sla-plan", allow_abbrev=False, add_help=False)
    known = add_device_arg(add_plan_args(add_sla_args(add_known_flags(parser))))
    args, unknown = known.parse_known_args(list(argv))
    if unknown:
        raise _refusal(unknown)
    require_device_name(args.device)
    if args.core_attention != MEGATRON:
        raise _refusal(["--core-attention", args.core_attention])
    return args


def _attribute(name: str) -> str:
    return _NAMED.get(name, name.replace("-", "_"))


def _refusal(words: Sequence[str]) -> StartError:
    """What to say of words that nothing here takes."""
    at = next((index for index, word in enumerate(words) if word.startswith("-")), None)
    if at is None:
        return unknown_flag(words, ())
    values = takewhile(lambda word: not word.startswith("-"), words[at + 1 :])
    given = " ".join([words[at], *values])
    return StartError(f"{given}: needs Megatron, which is not installed, to say what it means: {INSTALL}")
