"""Options of Megatron's branch dev that go with ``--sla`` or with our entry point in no way, or not in the way they do
elsewhere.  Arguments of another Megatron do not have them.
"""

from __future__ import annotations

from argparse import Namespace

from ..common.errors import OFF, FlagError, Refusal
from ..upstream.adapters.schedule_nodes import has_schedule_nodes

_NO_SEQUENCES = "sequences of lengths that change from step to step were not tried"

REFUSED: tuple[Refusal, ...] = (
    ("enable_hyper_connections", OFF, "no hyper-connections with --sla: a pipeline's hidden states have another width"),
    ("head_wise_attn_gate", OFF, "no --head-wise-attn-gate with --sla: the gates are rows of the projection of keys"),
    (
        "rotary_base_per_layer",
        OFF,
        "no --rotary-base-per-layer with --sla: a layer rotates the keys that it reads of another one",
    ),
    ("moe_n_hash_layers", OFF, "0 with --sla, with which routing by token was not tried"),
    ("dynamic_context_parallel", OFF, f"no --dynamic-context-parallel with --sla: {_NO_SEQUENCES}"),
    ("sequence_packing_scheduler", OFF, f"no --sequence-packing-scheduler with --sla: {_NO_SEQUENCES}"),
    ("use_varlen_dataset", OFF, f"no --use-varlen-dataset with --sla: {_NO_SEQUENCES}"),
)

#: What upstream's ``pretrain_gpt.py`` of that branch does beyond pretraining, and ours does not.
NOT_HERE: tuple[Refusal, ...] = (
    ("dynamic_context_parallel", OFF, "no --dynamic-context-parallel in this entry point"),
    ("sequence_packing_scheduler", OFF, "no --sequence-packing-scheduler in this entry point"),
    ("use_varlen_dataset", OFF, "no --use-varlen-dataset in this entry point"),
    ("pad_packed_seq_alignment", OFF, "no --pad-packed-seq-alignment in this entry point"),
    ("sft_mock_dataset_config_json", OFF, "no --sft-mock-dataset-config-json in this entry point"),
)


def refuse_overlap_of_experts(args: Namespace) -> None:
    """Raise :class:`FlagError` where layers are cut into a schedule's nodes between which K/V cannot go."""
    flag = "overlap_moe_expert_parallel_comm"
    if getattr(args, flag, False) and not has_schedule_nodes():
        raise FlagError(
            "--overlap-moe-expert-parallel-comm",
            True,
            "no such overlap with --sla in this Megatron, which cuts layers otherwise than 0.19 and 0.20",
        )


def say_how_keys_travel(args: Namespace) -> None:
    """With ``--core-attention sdpa``, which gathers them over context-parallel ranks: so, in place.

    dev refuses its own default, ``p2p``, for layers without Transformer Engine; others do not look at it there.
    """
    if hasattr(args, "fallback_to_eager_attn") and args.context_parallel_size > 1:
        args.cp_comm_type = ["all_gather"]
