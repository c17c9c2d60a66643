"""On each rank: sla-eval's command once, and its models over these ranks, one after the other in the same processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from .evaluation import generated, log_likelihoods
from .trainer_worker import open_servers


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    rank, local_rank = os.environ["RANK"], os.environ["LOCAL_RANK"]
    os.chdir(request["folder"])
    servers, ports = open_servers(request["ports"]), iter(request["ports"])

    def next_run() -> None:
        port = next(ports)
        os.environ.update(MASTER_PORT=str(port), LOCAL_RANK=local_rank)
        servers.pop(str(port), None)

    from sla_megatron.commands.evaluate import cli

    next_run()
    sys.argv = ["sla-eval", *request["command"]]
    cli.main()
    # Imported after the command, which has to find the model by its name.
    from sla_megatron.commands.evaluate.megatron_lm import SLAMegatronLM

    answers: dict[str, Any] = {}
    for name, arguments in request["models"].items():
        next_run()
        model = SLAMegatronLM(**arguments, batch_size=3)
        answers[name] = (log_likelihoods(model), generated(model))
        model.close()
    next_run()
    model = SLAMegatronLM(**request["copies"], batch_size=3)
    answers["copies"] = scores_of_copies(model)
    model.close()
    (folder / f"answer{rank}.json").write_text(json.dumps(answers))


def scores_of_copies(model: Any) -> dict[str, list[float]] | None:
    """Each question's log-likelihoods of its choices, as lm-eval gathers them on the first copy."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path="tasks", include_defaults=False)
    found = simple_evaluate(model, tasks=["my_choices"], task_manager=tasks, log_samples=True)
    if found is None:
        return None
    return {s["doc"]["question"]: [each[0][0] for each in s["resps"]] for s in found["samples"]["my_choices"]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
