"""The list of upstream names that this project touches: it is complete, and the installed upstream fits it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import sla_megatron
from sla_megatron import cpu_backend
from sla_megatron.upstream.seams import OneOf, Seam, Wrapping, replaced, source_hash

PACKAGE = Path(sla_megatron.__file__).parent

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def entries(megatron_imported: None) -> list[Any]:
    """The registry."""
    from sla_megatron.commands.patch.registry import registry

    return registry()


def test_every_name_fits_the_installed_upstream(entries: list[Any]) -> None:
    """Each exists, with the parameters that were expected, and none is there twice."""
    assert [entry.misfit() for entry in entries if entry.misfit()] == []
    targets = [target for entry in entries for target in entry.targets]
    assert len(targets) > 50
    assert len(set(targets)) == len(targets)


def test_what_is_restated_was_read_in_the_installed_version(entries: list[Any]) -> None:
    """The version that the environment holds is among those that a pinned source is said to be of."""
    installed = version("megatron-core")
    fitting = [entry.name.fitting() for entry in entries]
    pinned = {name.target: name for name in fitting if name.sources}
    assert len(pinned) >= 3
    for target, name in pinned.items():
        owner, attribute = name.resolve()
        read_in = name.sources[source_hash(getattr(owner, attribute))]
        first, _, last = read_in.partition(",")[0].partition(" to ")
        assert Version(first) <= Version(installed) <= Version(last or first), (target, read_in)


def fitting_seams(entries: list[Any]) -> list[Seam | Wrapping]:
    """What something stands for in the installed upstream."""
    return [name for entry in entries if isinstance(name := entry.name.fitting(), Seam | Wrapping)]


def test_every_stand_in_takes_what_upstream_s_name_takes(entries: list[Any]) -> None:
    """Where a signature is pinned, the stand-in takes the same parameters, by keyword too."""
    pinned = [name for name in fitting_seams(entries) if name.parameters is not None]
    assert len(pinned) >= 8
    for seam in pinned:
        owner, name = seam.resolve()
        signature = inspect.signature(seam.wrap(getattr(owner, name)) if isinstance(seam, Wrapping) else seam.stand_in)
        if tuple(signature.parameters) != seam.parameters:
            signature.bind(**dict.fromkeys(seam.parameters))


def test_without_sla_a_gpu_run_replaces_what_the_wheel_cannot_do(entries: list[Any]) -> None:
    """Nothing in a checkout, and one build step with the wheel."""
    from sla_megatron.commands.patch.registry import ALWAYS, WHEEL

    touched = fitting_seams([entry for entry in entries if entry.when in (ALWAYS, WHEEL)])
    assert [seam.target for seam in touched] == ["megatron.core.datasets.utils:compile_helpers"]


# Complete.


def test_every_declaration_in_the_sources_is_listed(entries: list[Any]) -> None:
    """A seam that is written down somewhere and not put into the registry is found here."""
    listed = {target for entry in entries for target in entry.targets}
    written = {
        call.args[0].value
        for path in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("Seam", "Reliance", "Wrapping")
        if isinstance(call.args[0], ast.Constant)
    }
    assert len(written) > 20
    assert written <= listed


def owners() -> dict[str, Any]:
    """All modules of Megatron and torch that are imported, and all classes that they define, by their dotted name."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("megatron", "torch") or not isinstance(getattr(module, "__dict__", None), dict):
            continue
        found[name] = module
        for attribute, value in list(vars(module).items()):
            if isinstance(value, type) and value.__module__ == name:
                found[f"{name}:{attribute}"] = value
    return found


def attributes() -> dict[str, Any]:
    """Every attribute of :func:`owners`, as ``module:Class.attribute``."""
    return {
        f"{name}{'.' if ':' in name else ':'}{attribute}": value
        for name, owner in owners().items()
        for attribute, value in list(vars(owner).items())
    }


@contextmanager
def as_before(wrappings: Sequence[Wrapping | OneOf]) -> Iterator[None]:
    """Within the block upstream's own functions are there to be wrapped; what was there before is there afterwards."""
    places = [wrapping.resolve() for wrapping in wrappings]
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), function in zip(places, before, strict=True):
        setattr(owner, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def test_what_is_really_replaced_is_listed(entries: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attribute of Megatron and torch that changes in a run on the CPU with all of --sla, and no other."""
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel

    from sla_megatron.attention.sla_config import SLAConfig
    from sla_megatron.flags.checkpoint_settings import CHECKED_ON_LOADING, check_settings_on_loading
    from sla_megatron.flags.gpt_hybrid_load import ACROSS_KINDS, load_across_kinds
    from sla_megatron.model.mamba_parts import MAMBA_PARTS
    from sla_megatron.model.recomputation import CHECKPOINTED_FORWARD, HYBRID_CHECKPOINTED_FORWARD
    from sla_megatron.model.schedule_plan import BUILD_SCHEDULE_PLAN, install_sharing_in_plans
    from sla_megatron.model.transformer_block import sla_transformer_blocks
    from sla_megatron.pipeline.transport import SCHEDULES, install_transport
    from sla_megatron.training.checkpoint_writer import (
        LOCAL_TENSOR,
        SAVE_CONFIG,
        carry_tokenizer_along,
        find_sharded_parameters,
        results_here,
    )
    from sla_megatron.training.save_file import RUN_FOLDER, WRAPPINGS, heed_save_file
    from sla_megatron.upstream.compiled_helpers import COMPILE_HELPERS

    def everything() -> dict[str, Any]:
        # What is wrapped stays so for the rest of the process; here, until upstream's own is put back.
        sla = SLAConfig(4, 4, (3,), 3)
        wrapped = [*SCHEDULES, BUILD_SCHEDULE_PLAN, CHECKED_ON_LOADING, SAVE_CONFIG, LOCAL_TENSOR]
        wrapped += [*ACROSS_KINDS, *WRAPPINGS]
        run = Namespace(num_layers=1, load="hybrid", no_load_optim=True, ckpt_format="torch_dist", mtp_num_layers=None)
        with cpu_backend(), sla_transformer_blocks(sla, torch_attention=True), as_before(wrapped):
            install_transport()
            install_sharing_in_plans()
            check_settings_on_loading(Namespace(non_persistent_ckpt_type="local"))
            load_across_kinds(run, Namespace(hybrid_layer_pattern="*-"))
            carry_tokenizer_along(Namespace(save="checkpoints", sla=True, ckpt_format="torch_dist"))
            find_sharded_parameters(Namespace(use_torch_fsdp2=True))
            heed_save_file(Namespace(save="checkpoints", exit_signal_handler=True))
            # Each is installed for a while, at a time of its own.
            briefly = [CHECKPOINTED_FORWARD, HYBRID_CHECKPOINTED_FORWARD, *MAMBA_PARTS, COMPILE_HELPERS, results_here()]
            encoders = [sla_transformer_blocks(sla, model) for model in (BertModel, CLIPViTModel)]
            with encoders[0], encoders[1], replaced(briefly):
                return attributes()

    monkeypatch.setenv(RUN_FOLDER, "runs/gpt")
    # Once for what upstream itself fills in when it is first asked.
    everything()
    before = attributes()
    during = everything()
    # What is new in a module is what it imported meanwhile; what is new in a class stands for what it inherits.
    is_of_class = {name: "." in name.partition(":")[2] for name in during}
    changed = {name for name in during if name in before or is_of_class[name] if during[name] is not before.get(name)}
    # A configuration module of torch's keeps its values elsewhere.
    listed = {seam.target for seam in fitting_seams(entries)} - {"torch._dynamo.config:disable"}
    assert changed == listed
    after = attributes()
    assert {name for name, value in before.items() if after.get(name) is not value} == set()


def subclasses_of_megatron() -> dict[str, list[type]]:
    """Every class of this project that extends classes of Megatron -> those."""
    found: dict[str, list[type]] = {}
    for module in pkgutil.walk_packages([str(PACKAGE)], "sla_megatron."):
        # It extends vLLM, whose environment has no Megatron.
        if module.name.startswith("sla_megatron.hf.serving."):
            continue
        for ours in vars(importlib.import_module(module.name)).values():
            if isinstance(ours, type) and ours.__module__.startswith("sla_megatron."):
                bases = [base for base in ours.__mro__ if base.__module__.startswith("megatron.")]
                if bases:
                    found[f"{ours.__module__}.{ours.__qualname__}"] = [ours, *bases]
    return found


def test_every_overridden_method_is_listed(entries: list[Any], megatron: None) -> None:
    """What a subclass of a Megatron class defines again is in the registry by the upstream class's name."""
    listed = {form.target for entry in entries for form in entry.forms if not isinstance(form, Seam | Wrapping)}
    found = subclasses_of_megatron()
    assert len(found) >= 4
    overridden = set()
    for ours, *bases in found.values():
        for name, value in vars(ours).items():
            if isinstance(value, Callable | str) and not name.startswith("__") or name == "__init__":
                if any(name in vars(base) for base in bases):
                    overridden.add(f"{bases[0].__module__}:{bases[0].__qualname__}.{name}")
    # A dataclass writes its own __init__.
    overridden -= {f"megatron.training.models.{of}ModelConfig.__init__" for of in ("gpt:GPT", "hybrid:Hybrid")}
    assert overridden <= listed
