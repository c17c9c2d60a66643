"""Every name of Megatron and torch that this project touches when it runs, and why: ``sla-patch registry`` prints it.

Touched means replaced, overridden in a subclass that takes the upstream class's place, restated, or called with
knowledge of how upstream calls it.  Each name is declared where it is used; this puts them together.  What is only
imported is not here: where it is missing, the import says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...attention.core_attention import RELIED_ON
from ...attention.self_attention import QUERY_KEY_VALUE, ROLE
from ...attention.sla_config import SLAConfig
from ...cpu.replacements import replacements
from ...flags.arguments import PARSING
from ...flags.checkpoint_settings import CHECKED_ON_LOADING
from ...flags.fused_kernels import APEX, FUSED_GRADIENTS, FUSED_ROTARY
from ...flags.gpt_hybrid_load import ACROSS_KINDS
from ...model import builder, hybrid_stack, transformer_block
from ...model.mamba_parts import MAMBA_PARTS
from ...model.recomputation import CHECKPOINTED_FORWARD, HYBRID_CHECKPOINTED_FORWARD
from ...model.schedule_plan import BUILD_SCHEDULE_PLAN, SCHEDULE_NODES
from ...model.transformer_block import BERT_MODEL, VISION_MODEL, transformer_block_seam
from ...pipeline.communicator import COMMUNICATOR
from ...pipeline.exchange import NEIGHBOURS
from ...pipeline.pass_timers import TIMERS
from ...pipeline.transport import SCHEDULE_HELPERS, SCHEDULES
from ...training.checkpoint_writer import LOCAL_TENSOR, RESULTS_QUEUE, SAVE_CONFIG, results_here
from ...training.save_file import WRAPPINGS as SAVE_FILE
from ...upstream.adapters.checkpoint_interop import has_checkpoint_interop
from ...upstream.adapters.schedule_nodes import has_schedule_nodes
from ...upstream.compiled_helpers import COMPILE_HELPERS
from ...upstream.seams import OneOf, Reliance, Seam, SeamError, Wrapping

#: When a name is touched.
ALWAYS = "in every run, with --sla or without"
BLOCK = "with --sla or --core-attention sdpa, while a model is built"
SLA = "with --sla"
HYBRID = "with --hybrid-layer-pattern and --sla, or on the CPU without"
MAMBA = "with Mamba layers in --hybrid-layer-pattern and without mamba_ssm or einops, while a model is built"
ENCODER = "while a script of one's own builds that model inside sla_transformer_blocks, such as with BertModel"
RECOMPUTATION = "with --sla, while a block runs under --recompute-granularity full"
PLANS = "with --sla, from when the first block with --overlap-moe-expert-parallel-comm is built"
PIPELINE = "with --sla, from when the first pipeline stage with K/V to move is built"
CORE_ATTENTION = "with --core-attention sdpa"
LOCAL = "with --non-persistent-ckpt-type local, where checkpoints are loaded, with --sla or without"
ACROSS = "where a hybrid model's checkpoint is loaded into a GPT, or a GPT's with numbered layers into a hybrid model"
SIGNALS = "with --async-save and --exit-signal-handler, with --sla or without"
ASKED = "with SLA_RUN_FOLDER, --save and --exit-signal-handler, from our entry point, with --sla or without"
CONVERSION = "with --save and without --async-save, with --sla or without; and while sla-convert saves a checkpoint"
RATES = "by sla-doctor --rates"
SAVE = "with --sla and --save, from our entry point, until upstream saves tokenizers itself"
FSDP2 = "with --use-torch-fsdp2, from our entry point, with --sla or without"
WHEEL = "with megatron-core's wheel, on any device: a checkout has the Makefile"
KERNELS = "from our entry point on a GPU, with --sla or without"
CPU = "on the CPU"


@dataclass(frozen=True)
class Entry:
    """One name.

    Attributes:
        name: the declaration: dotted target, reason, and parameters where upstream must have these; or one for each
            form that versions of Megatron have.
        when: in which runs it is touched.
    """

    name: Reliance | OneOf
    when: str

    @property
    def forms(self) -> tuple[Reliance, ...]:
        """The declaration, or all of them."""
        return self.name.declarations if isinstance(self.name, OneOf) else (self.name,)

    @property
    def targets(self) -> tuple[str, ...]:
        """The dotted targets, each once."""
        return tuple(dict.fromkeys(form.target for form in self.forms))

    def misfit(self) -> str | None:
        """Why the name of the Megatron that is imported is not the expected one; ``None`` if it is."""
        try:
            self.name.require()
        except SeamError as error:
            return str(error)
        return None


def is_replaced(form: Reliance) -> bool:
    """Whether something else stands for the name; else it is overridden, called or restated."""
    return isinstance(form, Seam | Wrapping)


def registry() -> list[Entry]:
    """All of them that the imported Megatron may have touched, those of ``--sla`` first."""
    # Any settings will do: what stands for a name is made for a model, the name is the same for all.
    sla = SLAConfig(2, 1, (1,), 1)
    return [
        *_entries(BLOCK, [transformer_block_seam(sla), *builder.OVERRIDDEN]),
        *_entries(SLA, [QUERY_KEY_VALUE, ROLE, *transformer_block.OVERRIDDEN]),
        *_entries(HYBRID, hybrid_stack.OVERRIDDEN),
        *_entries(ENCODER, [transformer_block_seam(sla, model) for model in (BERT_MODEL, VISION_MODEL)]),
        *_entries(RECOMPUTATION, [CHECKPOINTED_FORWARD, HYBRID_CHECKPOINTED_FORWARD]),
        *(_entries(PLANS, [BUILD_SCHEDULE_PLAN, *SCHEDULE_NODES]) if has_schedule_nodes() else ()),
        *_entries(PIPELINE, [*SCHEDULES, *COMMUNICATOR, *SCHEDULE_HELPERS]),
        *_entries(RATES, [*TIMERS, *NEIGHBOURS]),
        *_entries(CORE_ATTENTION, [*RELIED_ON, transformer_block.FURTHER_LAYERS]),
        *_entries(MAMBA, MAMBA_PARTS),
        *_entries(LOCAL, [CHECKED_ON_LOADING]),
        *(_entries(ACROSS, ACROSS_KINDS) if has_checkpoint_interop() else ()),
        *_entries(SIGNALS, [RESULTS_QUEUE]),
        *_entries(ASKED, SAVE_FILE),
        *_entries(CONVERSION, [results_here()]),
        *_entries(SAVE, [SAVE_CONFIG]),
        *_entries(FSDP2, [LOCAL_TENSOR]),
        *_entries(ALWAYS, [PARSING]),
        *_entries(KERNELS, [FUSED_GRADIENTS, APEX, FUSED_ROTARY]),
        *_entries(WHEEL, [COMPILE_HELPERS]),
        *_entries(CPU, replacements()),
    ]


def _entries(when: str, names: Sequence[Reliance | OneOf]) -> list[Entry]:
    return [Entry(name, when) for name in names]
