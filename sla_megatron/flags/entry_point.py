"""What the entry point, ``sla_megatron.pretrain_gpt``, does not do."""

from __future__ import annotations

from argparse import Namespace

from ..common.errors import OFF, Refusal, refuse
from . import dev
from .data_splits import require_data_of_each_part
from .needed import AT_START, NOT_INSTALLED
from .rows import refuse_rows
from .unhonoured import ROWS

# What upstream's pretrain_gpt.py does beyond pretraining, and ours does not.
_NOT_HERE: tuple[Refusal, ...] = (
    ("fim_data", OFF, "no --fim-data: fill-in-the-middle is not part of this entry point"),
    ("hybrid_context_parallel", OFF, "no --hybrid-context-parallel in this entry point"),
    ("logits_load_dir", OFF, "no --logits-load-dir: distillation is not part of this entry point"),
    ("per_dataset_sequences_path", OFF, "no --per-dataset-sequences-path in this entry point"),
    ("perform_rl_step", OFF, "no reinforcement learning in this entry point"),
    ("dataloader_type", (None, "single", "cyclic"), "single or cyclic: an external loader needs a script of its own"),
    (
        "position_embedding_type",
        ("learned_absolute", "rope", "yarn", "relative", "none"),
        "rope: batches in this entry point have no positions in three dimensions",
    ),
)


def require_pretraining(args: Namespace, packages: bool = True) -> None:
    """Refuse what the entry point, or Megatron, does not do, rather than ignore it.  Raises :class:`FlagError`.

    ``packages``: so too what needs a package that is not installed here.
    """
    refuse(args, (*_NOT_HERE, *dev.NOT_HERE))
    refuse_unhonoured(args, packages)


def refuse_unhonoured(args: Namespace, packages: bool = True) -> None:
    """Raise :class:`FlagError` for a flag that would not do what it says, here or in a script of the user's own."""
    refuse_rows(args, (*ROWS, *NOT_INSTALLED) if packages else ROWS)


def require_data_and_folders(args: Namespace) -> None:
    """Refuse validated arguments whose data or folders would end a run later.  Raises :class:`StartError`."""
    refuse_rows(args, AT_START)
    require_data_of_each_part(args)
