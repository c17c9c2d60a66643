"""``sla-plan``: what skip-layer attention moves, keeps and costs in a pipeline, before anything runs.

It takes the flags of ``sla_megatron.pretrain_gpt`` and some of its own (``flags.py``), and needs no GPU:

    sla-plan --sla --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 4096 \\
        --max-position-embeddings 4096 --micro-batch-size 1 --global-batch-size 32 --bf16 \\
        --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3 \\
        --link-gb-per-s 50 --compute-tflops 400 --suggest --plot step.svg --draw pattern.svg
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ...common.errors import one_line_errors
from ...common.files import write_whole
from ...common.flag_types import OneLineParser
from ...common.waiting import waiting_for
from ...flags.sla_flags import add_sla_args, refuse_unknown_sla_flags
from ...upstream.megatron_version import megatron_origin
from . import draw, without_megatron
from .as_json import as_json
from .figures import Figures
from .flags import STDOUT, add_plan_args, check_plan_args, rates
from .job import Job
from .plot import plot
from .report import report
from .settle import settled_job

#: Seconds after which a long search says how far it is.
_PATIENCE = 3.0


def main() -> None:
    """Plan for the run that ``sys.argv`` describes.  A bad flag ends it: one line on stderr, exit status 2."""
    # A plan is one process's, whatever launched it.
    os.environ["RANK"] = "0"
    parser = OneLineParser(
        "sla-plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other flag is the run's: sla-pretrain --help lists them.",
        allow_abbrev=False,
    )
    with one_line_errors("sla-plan"):
        # Before Megatron is imported, which takes seconds.
        asked, _ = add_plan_args(add_sla_args(parser)).parse_known_args()
        refuse_unknown_sla_flags(sys.argv[1:])
        check_plan_args(asked)
        _plan(asked)


def _plan(asked: argparse.Namespace) -> None:
    job = _job()
    figures = Figures.of(job, rates(asked), asked.suggest, _progress())
    if asked.plot is not None:
        plot(figures.prediction, Path(asked.plot))
    if asked.draw not in (None, STDOUT):
        write_whole(Path(asked.draw), draw.picture(job))
    if asked.json not in (None, STDOUT):
        write_whole(Path(asked.json), as_json(figures) + "\n")
    print(as_json(figures) if asked.json == STDOUT else draw.text(job) if asked.draw == STDOUT else report(figures))


def _job() -> Job:
    if megatron_origin() is None:
        # Nobody is to take the plan for one that Megatron has accepted.
        print("sla-plan: Megatron is not installed: what flags mean is said by a table of 0.19's", file=sys.stderr)
        return without_megatron.settled_job(sys.argv[1:])
    with waiting_for("sla-plan", "asking Megatron what the flags mean", quick=True):
        return settled_job()


def _progress() -> Callable[[str], None]:
    start = time.monotonic()

    def say(line: str) -> None:
        if time.monotonic() - start > _PATIENCE:
            print(f"sla-plan: {line}", file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    main()
