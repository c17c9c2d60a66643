"""Megatron's own encoder, ``BertModel``, dense and with skip-layer attention."""

from __future__ import annotations

from argparse import Namespace

from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer import ModuleSpec, TransformerConfig

from examples.side_by_side.models import dense_and_sla

from .data import VOCABULARY


def encoders(args: Namespace, seed: int) -> dict[str, BertModel]:
    """Both, of the same weights."""

    def build(config: TransformerConfig, spec: ModuleSpec) -> BertModel:
        return BertModel(
            config=config,
            num_tokentypes=0,
            transformer_layer_spec=spec,
            vocab_size=VOCABULARY,
            max_sequence_length=args.seq_length,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            add_binary_head=False,
        )

    return dense_and_sla(args, seed, BertModel, bert_layer_local_spec, build)
