"""The job's model made tiny: the same layers, heads, groups, stages and SLA settings, and the smallest widths."""

from __future__ import annotations

import copy
from argparse import Namespace

from ...common.errors import FlagError
from ...common.patterns import MAMBA, kinds
from .finding import Skipped

#: Sides of a rank's matrices are multiples of it, as tensor cores and every kind of fp8 accept.
_UNIT = 32
HIDDEN, HEAD, SEQUENCE, VOCABULARY = 64, 32, 32, 128


def tiny_args(args: Namespace) -> Namespace:
    """A copy of the job's validated arguments with the tiny model's sizes; how it is spread stays."""
    tiny = copy.copy(args)
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    sequence = SEQUENCE * tensor * context
    vars(tiny).update(
        hidden_size=HIDDEN,
        kv_channels=min(HEAD, args.kv_channels),
        ffn_hidden_size=_UNIT * tensor,
        seq_length=sequence,
        decoder_seq_length=None,
        max_position_embeddings=sequence,
        padded_vocab_size=VOCABULARY * tensor,
        micro_batch_size=1,
        # Of one document each.
        reset_attention_mask=False,
        # Buffers of the job's own size.
        tp_comm_overlap=False,
        cuda_graph_impl="none",
    )
    if args.num_experts:
        tiny.moe_ffn_hidden_size = _UNIT * (args.expert_tensor_parallel_size or tensor)
    if MAMBA in kinds(args.hybrid_layer_pattern or ""):
        # As few as the groups allow, which ranks share.
        tiny.mamba_num_heads = args.mamba_num_groups
    for name, size in (("moe_shared_expert_intermediate_size", _UNIT * tensor), ("moe_latent_size", HIDDEN)):
        if getattr(args, name, None):
            setattr(tiny, name, size)
    return tiny


def on_one_process(args: Namespace) -> Namespace:
    """A copy of ``args`` without parallelism, for the CPU.

    Raises:
        Skipped: for a model that needs a GPU.
    """
    from ...cpu.backend import cpu_backend_is_active
    from ...cpu.flags import fit_to_cpu

    one = copy.copy(args)
    vars(one).update(
        rank=0,
        world_size=1,
        data_parallel_size=1,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        hierarchical_context_parallel_sizes=None,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        sequence_parallel=False,
        pipeline_model_parallel_layout=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        num_distributed_optimizer_instances=1,
        microbatch_group_size_per_vp_stage=None,
        overlap_p2p_comm=False,
        # They need experts on several ranks.
        overlap_moe_expert_parallel_comm=False,
        delay_wgrad_compute=False,
        ep_overlap_early_attn_memory_release=False,
        batch_p2p_comm=True,
        nccl_communicator_config_path=None,
    )
    if args.hybrid_layer_pattern is not None:
        one.hybrid_layer_pattern = kinds(args.hybrid_layer_pattern)
    if cpu_backend_is_active():
        if on_gpus := sorted(set(one.hybrid_layer_pattern or "") & set("MG")):
            raise Skipped(f"needs a GPU: layers of {' and '.join(on_gpus)}")
        try:
            fit_to_cpu(one)
        except FlagError as error:
            raise Skipped(f"needs a GPU: {error.flag} {error.value}") from error
    return one


def num_microbatches(args: Namespace) -> int:
    """As few as fill the pipeline and suit an interleaved schedule."""
    return max(2, args.pipeline_model_parallel_size, args.microbatch_group_size_per_vp_stage or 1)
