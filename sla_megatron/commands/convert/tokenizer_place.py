"""Where the tokenizer of a checkpoint is now: in the checkpoint, where its arguments say, or beside it."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from ...common.tokenizers import CARRIED, CARRIED_FILES, TOKENIZER_FILES


def placed(args: Namespace, checkpoint: Path) -> tuple[Namespace, list[str]]:
    """The arguments of a checkpoint with the paths of its tokenizer where they are now, and which paths were tried.

    What the checkpoint itself holds comes first: nothing has changed it since.  A relative path is meant of the folder
    where training ran, which ``--save`` tells where it is relative too.  Arguments of which nothing is found stay.

    Args:
        args: as Megatron stored them.
        checkpoint: the folder of one iteration.
    """
    kind = getattr(args, "tokenizer_type", None)
    files = CARRIED_FILES.get(kind, {"tokenizer_model": ""} if kind == "HuggingFaceTokenizer" else {})
    given = {flag: getattr(args, flag, None) for flag in files}
    checkpoint = Path(os.path.abspath(checkpoint))
    carried = checkpoint / CARRIED
    candidates: list[dict[str, Path]] = [{flag: carried / name for flag, name in files.items()}]
    if all(given.values()):
        candidates += [
            {flag: base / (Path(path).name if named else path) for flag, path in given.items()}
            for base, named in _bases(list(given.values()), checkpoint, getattr(args, "save", None))
        ]
    tried: list[str] = []
    for paths in candidates if files else []:
        if all(_is_there(path, kind, path == carried) for path in paths.values()):
            return Namespace(**{**vars(args), **{flag: str(path) for flag, path in paths.items()}}), []
        tried += [str(path) for path in paths.values() if str(path) not in tried]
    return args, tried


def _bases(paths: list[str], checkpoint: Path, save: str | None) -> Iterator[tuple[Path, bool]]:
    """Folders to look in, the surest first, and whether a file is looked for by its name alone."""
    saves = checkpoint.parent
    if all(Path(path).is_absolute() for path in paths):
        # The path itself.
        yield saves, False
    else:
        run = _run_folder(saves, save)
        yield from ((base, False) for base in (run, checkpoint, saves, Path.cwd()) if base is not None)
        yield from ((base, False) for base in saves.parents[:2])
    yield checkpoint, True
    yield saves, True


def _run_folder(saves: Path, save: str | None) -> Path | None:
    """Where training ran, of a ``--save`` that is relative to it: ``/a`` of ``/a/b/c`` and ``b/c``."""
    if not save or os.path.isabs(save):
        return None
    parts = Path(os.path.normpath(save)).parts
    return Path(*saves.parts[: -len(parts)]) if parts != () and saves.parts[-len(parts) :] == parts else None


def _is_there(path: Path, kind: str, is_carried: bool) -> bool:
    if kind != "HuggingFaceTokenizer":
        return path.is_file()
    # What was broken off has no configuration.  Elsewhere a folder of the same name may hold anything.
    names = ("tokenizer_config.json",) if is_carried else TOKENIZER_FILES
    return any((path / name).is_file() for name in names)
