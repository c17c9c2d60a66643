"""``sla-doctor``: whether a pretraining job can run here, checked before it does.

It takes the flags of the job, as ``sla_megatron.pretrain_gpt`` does, and some of its own (``flags.py``).  Alone it
checks what one process can; started as the job is started, every node:

    sla-doctor --num-gpus 16 --sla --num-layers 24 ... --data-path data/corpus --save checkpoints
    torchrun --nproc-per-node 8 ... -m sla_megatron.commands.doctor.cli --bad-nodes bad_nodes.txt --sla ...
    sla-doctor --software

One line for each check.  With --rates it also measures what sla-plan predicts a step from, on the job's ranks, and its
last line is the flags for it.  Exit status 0 if none failed, else 1, and the last line on stderr names the first fault.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from ...common.errors import one_line_errors
from ...common.flag_types import OneLineParser
from ...common.silence import without_announcements
from ...cpu.device import add_device_arg, require_device_name
from .finding import Fault
from .flags import add_doctor_args, check_doctor_args
from .place import Place

if TYPE_CHECKING:
    from .node_checks import Asked


def main() -> None:
    """Examine the job that ``sys.argv`` describes.  A bad flag of this command ends it: one line, exit status 2."""
    parser = OneLineParser(
        "sla-doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other flag is the job's: sla-pretrain --help lists them.",
        allow_abbrev=False,
    )
    with one_line_errors("sla-doctor"):
        asked, _ = add_device_arg(add_doctor_args(parser)).parse_known_args()
        check_doctor_args(asked)
        require_device_name(asked.device)
    if asked.software:
        from .software import examine

        sys.exit(examine(asked.device))
    # Of an environment that lacks what it imports, the above says so.
    from .node_checks import Asked

    with without_announcements():
        status = _examine(Asked(asked.device, asked.num_gpus, asked.quick, asked.timeout, asked.bad_nodes, asked.rates))
    sys.exit(status)


def _examine(asked: Asked) -> int:
    from .examination import examine

    try:
        return examine(asked, Place.of(os.environ))
    except (Fault, TimeoutError) as fault:
        print(f"sla-doctor: error: first fault: ranks: {fault}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    main()
