"""On each rank: run ``sla-doctor`` for each request, one after the other in the same processes.

A rank may be told another node's name, other flags, or to hang in the layout; after a run that hangs there is no other.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sla_megatron.commands.doctor import cli

from .parsed_sources import parsed_once
from .trainer_worker import open_servers

RANK = int(os.environ["RANK"])


def main(folder: Path) -> None:
    requests = json.loads((folder / "request.json").read_text())
    servers = open_servers([request["port"] for request in requests.values()])
    answers = {}
    for name, request in requests.items():
        os.environ.update(MASTER_PORT=str(request["port"]), SLURMD_NODENAME=f"node{RANK}", LOCAL_RANK="0")
        argv = [*request["argv"], *request.get("of_rank", {}).get(str(RANK), [])]
        if request.get("hangs") == RANK:
            hang_in_the_layout()
        if "hangs" in request:
            # Nothing after it is reached: what it prints goes to the rank's log.
            write(folder, answers)
            run(argv)
        answers[name] = captured(argv)
        servers.pop(str(request["port"]), None)
    write(folder, answers)


def write(folder: Path, answers: dict[str, Any]) -> None:
    (folder / f"answer{RANK}.json").write_text(json.dumps(answers))


def captured(argv: list[str]) -> dict[str, Any]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = None
        try:
            run(argv)
        except SystemExit as ended:
            status = ended.code
    return {"status": status, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


def run(argv: list[str]) -> None:
    sys.argv = ["sla-doctor", *argv]
    with parsed_once():
        cli.main()


def hang_in_the_layout() -> None:
    from sla_megatron.commands.doctor import layout

    layout.build = lambda args: time.sleep(1000)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
