"""On each rank: run Megatron's trainer for each requested run, in the same processes, also after runs that failed.

What in-process restart does to a run that failed is done here by hand: the exception is dropped, the process groups are
destroyed without a word to the other ranks, which notice by a closed connection, and Megatron's globals are forgotten.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .parsed_sources import parsed_once
from .pipeline_listener import PipelineListener
from .trainer_worker import forget_megatron, open_servers


class Fault(Exception):
    """What a run is ended by."""


def main(folder: Path) -> None:
    requests = json.loads((folder / "request.json").read_text())
    logging.disable(logging.WARNING)
    from sla_megatron.cpu.device import megatron_device

    with megatron_device(["--device", os.environ.get("SLA_TEST_DEVICE", "cpu")]), parsed_once():
        from megatron.core.datasets import gpt_dataset

        # As the trainer's worker.
        gpt_dataset.MockGPTLowLevelDataset.size = 200
        answers = {}
        servers = open_servers([request["port"] for request in requests.values()])
        for name, request in requests.items():
            os.environ["MASTER_PORT"] = str(request.pop("port"))
            answers[name] = run(**request)
            servers.pop(os.environ["MASTER_PORT"], None)
    (folder / f"answer{os.environ['RANK']}.json").write_text(json.dumps(answers))


def run(argv: list[str], fault: dict[str, Any] | None = None) -> dict[str, Any]:
    """One run: what ended it (``None``: it ended well), its steps, and what of it is left.

    ``held`` and ``alive`` are the bytes of K/V, and their gradients, while its exception is held and when it is not.
    """
    from megatron.training import training

    from sla_megatron import pretrain_gpt

    # The gradients are other tests' affair.
    heard = PipelineListener(Path(os.devnull), Path(os.devnull))
    error, held = None, 0
    names_before = replaced_names()
    old_argv, sys.argv = sys.argv, ["pretrain", *argv]
    heard.listen_to(training)
    try:
        # To a file: a package that watches over the process asks for its descriptor.
        with open(os.devnull, "w") as nowhere, injected(fault):
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                pretrain_gpt.main()
    except (Fault, RuntimeError) as failed:
        error, held = type(failed).__name__, heard._live_bytes()
    finally:
        sys.argv = old_argv
        heard.stop()
    forget_megatron(together=error is None)
    gc.collect()
    left = [name for name, value in replaced_names().items() if value is not names_before[name]]
    figures = {key: value for key, value in heard.answer().items() if key in ("loss", "grad_norm")}
    return {"error": error, "held": held, "alive": heard._live_bytes(), "left": left + open_contexts()} | figures


def replaced_names() -> dict[str, Any]:
    """What each upstream name that this project replaces for a while stands for now."""
    from sla_megatron.commands.patch.registry import registry

    places = {entry.name.target: entry.name.resolve() for entry in registry() if type(entry.name).__name__ == "Seam"}
    return {target: getattr(*place) for target, place in places.items()}


def open_contexts() -> list[str]:
    """The microbatch or step that somebody left open."""
    from sla_megatron.pipeline import step, waiting

    return [module.__name__ for module in (waiting, step) if module._current.get() is not None]


@contextlib.contextmanager
def injected(fault: dict[str, Any] | None) -> Iterator[None]:
    """Within the block a :class:`Fault` is raised on ``rank`` at ``place``, when layer ``layer`` gets there for the
    ``count``-th time."""
    if fault is None or fault["rank"] != int(os.environ["RANK"]):
        yield
        return
    handle = PLACES[fault["place"]](fault.get("layer"), _after(fault.get("count", 1)))
    try:
        yield
    finally:
        handle.remove()


def _after(count: int) -> Callable[[], None]:
    left = [count]

    def reached() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Fault("injected")

    return reached


def _is(module: Any, kind: str, layer: int | None) -> bool:
    return type(module).__name__ == kind and (layer is None or module.layer_number == layer)


def _before(kind: str, only_recomputed: bool = False) -> Callable[..., Any]:
    """Before the forward pass of a module."""

    def install(layer: int | None, reached: Callable[[], None]) -> Any:
        import torch

        def hook(module: Any, _: Any) -> None:
            if _is(module, kind, layer) and (torch.is_grad_enabled() or not only_recomputed):
                reached()

        return torch.nn.modules.module.register_module_forward_pre_hook(hook)

    return install


def _after_forward(kind: str) -> Callable[..., Any]:
    def install(layer: int | None, reached: Callable[[], None]) -> Any:
        import torch

        def hook(module: Any, _: Any, __: Any) -> None:
            if _is(module, kind, layer):
                reached()

        return torch.nn.modules.module.register_module_forward_hook(hook)

    return install


def _in_backward(layer: int | None, reached: Callable[[], None]) -> Any:
    """When the gradient of a layer's output is there."""
    import torch

    def hook(module: Any, _: Any, output: Any) -> None:
        if _is(module, "TransformerLayer", layer):
            output[0].register_hook(lambda _: reached())

    return torch.nn.modules.module.register_module_forward_hook(hook)


def _building(_: int | None, reached: Callable[[], None]) -> Any:
    """When a model gets its block."""
    import torch

    def hook(_: Any, name: str, __: Any) -> None:
        if name == "decoder":
            reached()

    return torch.nn.modules.module.register_module_module_registration_hook(hook)


PLACES: dict[str, Callable[[int | None, Callable[[], None]], Any]] = {
    "building": _building,
    "chunk": _before("GPTModel"),
    "layer": _before("TransformerLayer"),
    "attention": _after_forward("DotProductAttention"),
    "recomputation": _before("TransformerLayer", only_recomputed=True),
    "backward": _in_backward,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
