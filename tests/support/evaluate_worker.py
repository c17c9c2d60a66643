"""On each rank: sla-eval with each requested command line, one after the other in the same processes."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

from .trainer_worker import open_servers


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    rank, local_rank = os.environ["RANK"], os.environ["LOCAL_RANK"]
    from sla_megatron.commands.evaluate import cli

    os.chdir(request["folder"])
    servers = open_servers(request["ports"])
    answers = []
    for port, argv in zip(request["ports"], request["commands"], strict=True):
        os.environ.update(MASTER_PORT=str(port), LOCAL_RANK=local_rank)
        sys.argv = ["sla-eval", *argv]
        try:
            cli.main()
            answers.append(0)
        except SystemExit as ended:
            answers.append(ended.code)
        # The model's process groups end with it.
        gc.collect()
        servers.pop(str(port), None)
    (folder / f"answer{rank}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
