"""A chain of attempts that a test plays: checkpoints as Megatron leaves them, and what sla-job makes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from sla_megatron.commands.job.attendance import Attendance
from sla_megatron.commands.job.chain import Chain, begin, end
from sla_megatron.commands.job.flags import TrainingFlags
from sla_megatron.commands.job.keep import Keep
from sla_megatron.common.checkpoint_folders import TRACKER


class Run:
    """A run of 100 iterations, a save each 10, whose attempts a test plays."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoints, self.said = folder, folder / "checkpoints", []
        self.checkpoints.mkdir(parents=True)
        self.flags = TrainingFlags(self.checkpoints, 100, save_interval=10)

    def save(self, *iterations: int, value: float = 1.0, track: bool = True) -> None:
        """As Megatron does: the tracker is what is written last."""
        for iteration in iterations:
            path = self.path(iteration)
            save({"weight": torch.full((40, 10), value)}, storage_writer=FileSystemWriter(path), no_dist=True)
            (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
            if track:
                (self.checkpoints / TRACKER).write_text(str(iteration))

    def path(self, iteration: int) -> Path:
        return self.checkpoints / f"iter_{iteration:07d}"

    def flip(self, iteration: int) -> None:
        """One bit in the middle of a weight; the file's time stays what it was, as on a bad disk, if it is new."""
        file = self.path(iteration) / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[content.index(torch.ones(20).numpy().tobytes()) + 41] ^= 1
        file.write_bytes(content)

    def begin(self) -> str:
        self.said.clear()
        return begin(Chain.read(self.folder), self.flags, "1", "node1", 3, self.said.append)

    def end(self, status: int = 1) -> str:
        self.said.clear()
        return end(Chain.read(self.folder), self.flags, status, False, 3, self.said.append)

    def attend(
        self, keep: str | None = None, wait: Callable[[], object] | None = None, contents: bool = True, **more: bool
    ) -> int:
        """Until there is nothing to do; with ``wait``, until that says so."""
        self.said.clear()
        over = []

        def waited() -> None:
            over.append(wait is None or wait())

        read = Keep.read(keep) if keep else None
        settings = {"own_script": False} | more
        told = lambda: bool(over and over[-1])  # noqa: E731
        made = Attendance(self.folder, self.flags, read, contents, settings["own_script"], self.said.append, told)
        return made.attend(waited)

    def there(self) -> list[str]:
        """Iterations, and the names of what is put aside."""
        names = [path.name for path in self.checkpoints.iterdir() if path.is_dir()]
        return sorted(re.sub(r"^iter_0*|_\d{8}T.*", "", name) for name in names)

    def looks(self) -> dict[str, str | None]:
        stored = json.loads((self.folder / "checked.json").read_text())["checkpoints"]
        return {str(int(name[5:])): look["damage"] for name, look in stored.items()}
