"""Megatron's own encoder, ``BertModel``, dense and with skip-layer attention, of the same weights."""

from __future__ import annotations

from argparse import Namespace

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer import TransformerConfig

from sla_megatron import SLAConfig, sla_layer_spec, sla_transformer_blocks
from sla_megatron.cpu.flags import CONFIG_ON_CPU
from sla_megatron.flags.sla_flags import SDPA
from sla_megatron.model.layer_specs import torch_attention_spec

from .data import VOCABULARY


def start_megatron(device: str) -> None:
    """Megatron's process groups, of this one process."""
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def dense_and_sla(args: Namespace, seed: int) -> dict[str, BertModel]:
    """The two encoders; all weights have the same names and shapes, and begin with the same values."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    sla = SLAConfig(args.layers, args.heads, tuple(args.distance), args.skip_groups)
    spec = torch_attention_spec(bert_layer_local_spec) if args.core_attention == SDPA else bert_layer_local_spec
    models = {"dense": _bert(args, spec)}
    # These two are all that skip-layer attention needs.
    with sla_transformer_blocks(sla, BertModel):
        models["sla"] = _bert(args, sla_layer_spec(spec, sla))
    models["sla"].load_state_dict(models["dense"].state_dict())
    return models


def _bert(args: Namespace, spec: object) -> BertModel:
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        ffn_hidden_size=4 * args.hidden,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Megatron's 0.02 is for wide models; a narrow one learns to attend many times later with it.
        init_method_std=args.hidden**-0.5,
        **CONFIG_ON_CPU,
    )
    return BertModel(
        config=config,
        num_tokentypes=0,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=args.seq_length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        add_binary_head=False,
    ).cuda()
