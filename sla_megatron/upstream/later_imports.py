"""Packages that others import as they are imported, and use in few runs: here, at their first use.

A start of Megatron imports wandb for a comparison and transformers for tokenizers that read its formats: together a
second of a core and more in each rank, and hundreds of files from what may be a slow file system.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

#: Of names with two underscores, what a package's users ask for.  The others are what Python and ``inspect`` ask of all
#: modules that are there, which must import none.
_OF_USERS = ("__version__", "__all__")


class _LaterName:
    """Stands for ``from module import name``: found when it is called, subclassed or asked for anything."""

    def __init__(self, module: str, name: str) -> None:
        self._place = (module, name)

    def _found(self) -> Any:
        module, name = self._place
        return getattr(_import_now(module), name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found()(*args, **kwargs)

    def __or__(self, other: Any) -> Any:
        return self._found() | other

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._found())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._found(),)


class _LaterModule(ModuleType):
    """Stands for a module where it was bound while it was put off; equal to the module itself."""

    def __getattr__(self, name: str) -> Any:
        if name in _OF_USERS:
            return getattr(_import_now(self.__name__), name)
        if name.startswith("__"):
            raise AttributeError(name)
        real = sys.modules.get(self.__name__)
        return _LaterName(self.__name__, name) if real in (None, self) else getattr(real, name)

    def __eq__(self, other: object) -> bool:
        return other is self or (other is not None and other is sys.modules.get(self.__name__))

    def __hash__(self) -> int:
        return hash(self.__name__)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for ``packages``, and all modules in them, with modules that import nothing."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _LaterModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _import_now(name: str) -> ModuleType:
    """The module itself, whatever was put off."""
    package = name.partition(".")[0]
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            finder.packages.discard(package)
    _forget(package)
    return importlib.import_module(name)


def _forget(package: str) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and isinstance(module, _LaterModule):
            del sys.modules[name]


@contextmanager
def imported_later(*packages: str) -> Iterator[None]:
    """Within the block an import of one of ``packages`` binds what stands for it and imports it when it is used.

    Nothing is put off that is imported already, or not installed: whoever asks learns so at once.
    """
    wanted = {name for name in packages if name not in sys.modules and _is_installed(name)}
    finder = _Finder(set(wanted))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in wanted:
            _forget(name)


@contextmanager
def started_quickly() -> Iterator[None]:
    """Within the block Megatron is imported, without a search for garbage among what is imported.

    What is there at its end is left out of later searches too: Python then looks through what a step makes alone.
    Nothing is done where Megatron was imported before: what an earlier run left is still to be found.
    """
    if "megatron" in sys.modules:
        yield
        return
    gc.disable()
    try:
        with imported_later("wandb"):
            yield
        # Another Megatron may have them elsewhere.
        with imported_later("transformers"), suppress(ImportError):
            importlib.import_module("megatron.core.tokenizers.text")
        gc.freeze()
        # Or extension modules would complain, as Python ends, of what is left.
        atexit.register(gc.unfreeze)
    finally:
        gc.enable()


def _is_installed(package: str) -> bool:
    return importlib.machinery.PathFinder.find_spec(package) is not None
