"""``sla-doctor``: whether a pretraining job can run here, checked before it does.

It takes the flags of the job, as ``sla_megatron.pretrain_gpt`` does, and some of its own (``flags.py``).  Alone it
checks what one process can; started as the job is started, every node:

    sla-doctor --num-gpus 16 --sla --num-layers 24 ... --data-path data/corpus --save checkpoints
    torchrun --nproc-per-node 8 ... -m sla_megatron.commands.doctor.cli --bad-nodes bad_nodes.txt --sla --num-layers 24 ...

One line for each check.  Exit status 0 if none failed, else 1, and the last line on stderr names the first fault.
"""

from __future__ import annotations

import argparse
import os
import sys

from ...common.announcements import quiet
from ...common.errors import FlagError, one_line_errors
from ...cpu.backend import DEVICES
from ...cpu.device import add_device_arg
from .finding import Fault
from .flags import add_doctor_args, check_doctor_args
from .node_checks import Asked
from .place import Place


def main() -> None:
    """Examine the job that ``sys.argv`` describes.  A bad flag of this command ends it: one line, exit status 2."""
    parser = add_device_arg(
        add_doctor_args(
            argparse.ArgumentParser(
                "sla-doctor",
                description=__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                epilog="Every other flag is the job's: sla-pretrain --help lists them.",
                allow_abbrev=False,
            )
        )
    )
    with one_line_errors():
        asked, _ = parser.parse_known_args()
        check_doctor_args(asked)
        if asked.device not in DEVICES:
            raise FlagError("--device", asked.device, f"one of {', '.join(DEVICES)}")
    with quiet():
        status = _examine(Asked(asked.device, asked.num_gpus, asked.quick, asked.timeout, asked.bad_nodes))
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
