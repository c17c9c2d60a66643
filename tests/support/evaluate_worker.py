"""On each rank: models of sla-eval over these ranks, one after the other in the same processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from .evaluation import evaluated, generated, log_likelihoods
from .parsed_sources import parsed_once
from .trainer_worker import open_servers


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    rank, local_rank = os.environ["RANK"], os.environ["LOCAL_RANK"]
    os.chdir(request["folder"])
    servers = open_servers(request["ports"])
    from sla_megatron.commands.evaluate.megatron_lm import SLAMegatronLM

    answers: dict[str, Any] = {}
    for port, (name, arguments) in zip(request["ports"], request["models"].items(), strict=True):
        # Each makes its process group anew, on a port of its own.
        os.environ.update(MASTER_PORT=str(port), LOCAL_RANK=local_rank)
        with parsed_once():
            model = SLAMegatronLM(**arguments, batch_size=3)
        if name in request["tasks"]:
            answers[name] = evaluated(model, request["tasks"][name])
        else:
            answers[name] = (log_likelihoods(model), generated(model))
        model.close()
        servers.pop(str(port), None)
    (folder / f"answer{rank}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
