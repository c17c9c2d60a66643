"""Megatron's models that look both ways, each with its reference and what goes into it, for ``encoder_worker.py``.

Shapes: b batch, s sequence, h hidden.
"""

from __future__ import annotations

from typing import Any

from tests.support import parity_worker
from tests.support.parity_worker import HIDDEN, LAYERS, VOCABULARY


class Bert:
    """``BertModel`` on sequences of these lengths, the rest being padding; its output are logits."""

    LENGTHS, SEQUENCE, CHANGED_TOKEN = (12, 8, 1), 12, 5

    def __init__(self, case: dict[str, Any]) -> None:
        from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
        from megatron.core.models.bert.bert_model import BertModel

        from tests.reference_encoder import ReferenceEncoder

        self.case, self.kind, self.spec = case, BertModel, bert_layer_local_spec
        self.reference = parity_worker.reference_gpt(case, LAYERS, ReferenceEncoder)

    def build(self, config: Any, spec: Any) -> Any:
        return self.kind(
            config=config,
            num_tokentypes=0,
            transformer_layer_spec=spec,
            vocab_size=VOCABULARY,
            max_sequence_length=self.SEQUENCE,
            share_embeddings_and_output_weights=self.case["tied"],
            position_embedding_type="rope" if self.case["rope"] else "learned_absolute",
            add_binary_head=False,
        )

    def draw(self, generator: Any) -> None:
        import torch

        shape = (len(self.LENGTHS), self.SEQUENCE)
        self.given, self.labels = (torch.randint(VOCABULARY, shape, generator=generator).cuda() for _ in range(2))
        self.has_meaning = torch.arange(self.SEQUENCE).cuda() < torch.tensor(self.LENGTHS).cuda()[:, None]

    def output(self, model: Any, tokens: Any) -> Any:
        """``[b, s, vocabulary]``, whole on each rank."""
        from megatron.core import tensor_parallel

        logits, _ = model(tokens, self.has_meaning.float())
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)

    def expected(self, weights: Any) -> Any:
        return self.reference.logits(weights, self.given, self.has_meaning)

    def loss(self, logits: Any) -> Any:
        import torch.nn.functional as F

        return F.cross_entropy(logits[self.has_meaning], self.labels[self.has_meaning])

    def changed(self) -> Any:
        """What is given, but for one token of the first sequence."""
        tokens = self.given.clone()
        tokens[0, self.CHANGED_TOKEN] = (tokens[0, self.CHANGED_TOKEN] + 1) % VOCABULARY
        return tokens

    def other_padding(self) -> Any:
        """What is given, with other tokens where nothing has a meaning."""
        return self.given.where(self.has_meaning, (self.given + 1) % VOCABULARY)


class Vision:
    """``CLIPViTModel`` on images of two by three patches; its output are hidden states."""

    BATCH, HEIGHT, WIDTH, PATCH = 3, 8, 12, 4

    def __init__(self, case: dict[str, Any]) -> None:
        from megatron.core.models.vision.clip_vit_model import CLIPViTModel
        from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec

        from tests.reference_vision import ReferenceVision

        self.kind, self.spec = CLIPViTModel, get_vit_layer_with_local_spec()
        self.reference = parity_worker.reference_gpt(case, LAYERS, ReferenceVision)

    def build(self, config: Any, spec: Any) -> Any:
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        sizes = {"patch_dim": self.PATCH, "img_h": self.HEIGHT, "img_w": self.WIDTH}
        return self.kind(config, spec, ln_pre_impl=WrappedTorchNorm, **sizes)

    def draw(self, generator: Any) -> None:
        import torch

        tokens = 1 + self.HEIGHT * self.WIDTH // self.PATCH**2
        self.given = torch.randn(self.BATCH, 3, self.HEIGHT, self.WIDTH, generator=generator).cuda()
        self.weighted = torch.randn(self.BATCH, tokens, HIDDEN, generator=generator).cuda()
        self.has_meaning = torch.ones(self.BATCH, tokens, dtype=torch.bool).cuda()

    def output(self, model: Any, images: Any) -> Any:
        """``[b, s, h]``, whole on each rank."""
        return model(images)

    def expected(self, weights: Any) -> Any:
        return self.reference.hidden(weights, self.given.double())

    def loss(self, hidden: Any) -> Any:
        """All of it, each number with a weight of its own."""
        return (hidden * self.weighted).mean()

    def changed(self) -> Any:
        """What is given, but for the last pixel of the first image."""
        images = self.given.clone()
        images[0, 0, -1, -1] += 1.0
        return images

    def other_padding(self) -> Any:
        """There is none."""
        return self.given


MODELS = {"bert": Bert, "vision": Vision}
