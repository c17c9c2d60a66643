"""On each rank: run Megatron's whole trainer for each requested run, one after the other in the same processes.

Nothing of Megatron is replaced but by the CPU backend: this only listens, and shortens what ``--mock-data`` shuffles.
Each step's loss and gradient norm are written, exact, to ``<run>.jsonl`` as soon as they are known, so that they
outlive a killed process.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import runpy
import signal
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .parsed_sources import parsed_once


def main(folder: Path) -> None:
    requests = json.loads((folder / "request.json").read_text())
    logging.disable(logging.WARNING)
    # Imported here: Megatron's checkpoint writer starts a helper process that imports this module again.
    from sla_megatron.cpu.device import megatron_device

    with megatron_device(["--device", os.environ.get("SLA_TEST_DEVICE", "cpu")]), parsed_once():
        from megatron.core.datasets import gpt_dataset

        from sla_megatron.training import save_file

        # A step here is much shorter than what a save file may wait.
        save_file._SECONDS = 0.0
        # Shuffling the 25 million samples of upstream's mock corpus would take a third of a run.
        gpt_dataset.MockGPTLowLevelDataset.size = 200
        answers = {}
        servers = open_servers([request["port"] for request in requests.values()])
        for name, request in requests.items():
            # Each run makes its process group anew, on a port of its own.
            os.environ["MASTER_PORT"] = str(request.pop("port"))
            if "argv_by_rank" in request:
                request["argv"] = request.pop("argv_by_rank")[int(os.environ["RANK"])]
            answers[name] = run(folder, name, **request)
            servers.pop(os.environ["MASTER_PORT"], None)
    (folder / f"answer{os.environ['RANK']}.json").write_text(json.dumps(answers))


def open_servers(ports: list[int]) -> dict[str, Any]:
    """What the ranks of each run meet at, by port, opened before any run: a rank that comes first would wait seconds.

    In the process of rank 0 each run's own store then is another user of the same server.
    """
    from torch.distributed import TCPStore

    if os.environ["RANK"] != "0":
        return {}
    return {
        str(port): TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)
        for port in ports
    }


def run(
    folder: Path,
    name: str,
    argv: list[str],
    entry: str = "sla",
    pipeline: bool = False,
    graphs: bool = False,
    environment: dict[str, str] | None = None,
    touched: dict[str, str] | None = None,
    signalled: list[int] | None = None,
) -> dict[str, Any]:
    """One run: exit status, what it printed on stderr, and what the listener heard (``pipeline``: also on the wire).

    With ``graphs`` each step after the first is a recorded graph's replay (``recorded_graph.py``).  ``environment``
    is the ranks' for this run; ``touched`` names the file that somebody makes in an iteration; ``signalled``, a rank
    and an iteration: it gets SIGTERM then.
    """
    from megatron.training import training

    from .recorded_graph import HostNeeded, steps_as_graphs

    heard = Listener(folder / f"{name}.jsonl")
    if pipeline:
        from .pipeline_listener import PipelineListener

        heard = PipelineListener(folder / f"{name}.jsonl", folder / f"{name}.rank{os.environ['RANK']}.pt")
    heard.touched, heard.signalled = touched or {}, signalled
    earlier, began = dict(os.environ), time.time()
    os.environ.update(environment or {})
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    old_argv, sys.argv = sys.argv, ["pretrain", *argv]
    heard.listen_to(training)
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            steps_as_graphs(training) if graphs else contextlib.nullcontext([]) as recorded,
        ):
            ENTRIES.get(entry, lambda: runpy.run_path(entry, run_name="__main__"))()
    except SystemExit as ended:
        status = ended.code or 0
    except HostNeeded as error:
        status = f"needs the host: {error}"
    finally:
        sys.argv = old_argv
        for variable in environment or {}:
            os.environ.pop(variable)
        os.environ.update(earlier)
        heard.stop()
    # Not after an error, which ends this rank: the others may be waiting for something else than to leave together.
    forget_megatron()
    return {"status": status, "stderr": stderr.getvalue(), "stdout": stdout.getvalue(), **heard.answer()} | {
        "began": began,
        "graphs": [(len(graph.operations), graph.replays, graph.waits) for graph in recorded],
    }


def enter_sla() -> None:
    from sla_megatron import pretrain_gpt

    pretrain_gpt.main()


def enter_upstream() -> None:
    """The trainer with upstream's own parsing and model builder: no ``--sla`` code but the data reading."""
    from megatron.training import argument_utils
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    kind = "gpt" if args.hybrid_layer_pattern is None else "hybrid"
    _pretrain(args, getattr(argument_utils, f"{kind}_config_from_args")(args))


def enter_own_hybrid() -> None:
    """A script of one's own that trains hybrid models, which has two of its functions from here."""
    from sla_megatron import hybrid_config_from_args, parse_and_validate_args

    args = parse_and_validate_args()
    _pretrain(args, hybrid_config_from_args(args))


def _pretrain(args: Any, model: Any) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from sla_megatron.training.data import train_valid_test_datasets
    from sla_megatron.training.loss import forward_step

    config = pretrain_cfg_container_from_args(args, model)
    pretrain(config, train_valid_test_datasets, ModelType.encoder_or_decoder, forward_step)


ENTRIES: dict[str, Callable[[], None]] = {
    "sla": enter_sla,
    "upstream": enter_upstream,
    "own-hybrid": enter_own_hybrid,
}


class Listener:
    """Hears each step's loss and gradient norm, evaluations, and which shared K/V are still alive after a step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps: list[dict[str, Any]] = []
        self._evaluations: list[float] = []
        self._shared: list[weakref.ref] = []
        self._originals: list[tuple[Any, str, Any]] = []
        self.num_shared = 0
        self.touched: dict[str, str] = {}
        self.signalled: list[int] | None = None

    def listen_to(self, training: Any) -> None:
        from sla_megatron.pipeline.waiting import Microbatch

        self._wrap(training, "training_log", self._on_step)
        self._wrap(training, "evaluate", self._on_evaluation)
        self._wrap(Microbatch, "put", self._on_put)

    def _wrap(self, owner: Any, name: str, callback: Callable[[tuple, Any], None]) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            callback(args, result)
            return result

        self._originals.append((owner, name, original))
        setattr(owner, name, wrapper)

    def stop(self) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)

    def _on_step(self, args: tuple, _: Any) -> None:
        loss, iteration, grad_norm = args[0].get("lm loss"), args[3], args[7]
        step = {
            "iteration": int(iteration),
            "loss": None if loss is None else float(loss),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "alive": sum(reference() is not None for reference in self._shared),
        }
        self._shared.clear()
        self._steps.append(step)
        if os.environ["RANK"] == "0":
            with self._path.open("a") as file:
                print(json.dumps(step), file=file, flush=True)
            if path := self.touched.get(str(iteration)):
                Path(path).touch()
        if self.signalled == [int(os.environ["RANK"]), iteration]:
            os.kill(os.getpid(), signal.SIGTERM)

    def _on_evaluation(self, _: tuple, result: Any) -> None:
        if result[0] is not None and "lm loss" in result[0]:
            self._evaluations.append(float(result[0]["lm loss"]))

    def _on_put(self, args: tuple, _: Any) -> None:
        self.num_shared += 1
        self._shared += [weakref.ref(tensor) for tensor in args[2]]

    def answer(self) -> dict[str, Any]:
        return {
            "loss": [step["loss"] for step in self._steps],
            "grad_norm": [step["grad_norm"] for step in self._steps],
            "iteration": [step["iteration"] for step in self._steps],
            "alive": max((step["alive"] for step in self._steps), default=0),
            "evaluations": self._evaluations,
            "num_shared": self.num_shared,
        }


def forget_megatron(together: bool = True) -> None:
    """Undo what a run leaves in Megatron's module globals, so that the next can have another shape.

    The process groups too: each keeps gloo's threads alive, and hundreds of them slow every later run down.  What was
    destroyed ends when nothing refers to it any more, which Python finds out at its leisure: some thirty runs later.

    Args:
        together: whether all ranks come here, and leave the groups at once.
    """
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import random
    from megatron.training import global_vars

    if torch.distributed.is_initialized():
        if together:
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    parallel_state.destroy_model_parallel()
    global_vars.destroy_global_vars()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    gc.collect()
    # What a run has imported and kept is not looked through again after the next.
    gc.freeze()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
