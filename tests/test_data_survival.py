"""sla-data tokenize is killed, starved of disk and of workers: the same command goes on, to the same bytes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from sla_megatron.commands.data.cli import main
from sla_megatron.commands.data.workers import begin_preloading
from tests.support.tokenizers import hugging_face_folder

KILLS = 20
#: About half of how often a run from nothing touches its files: two or three kills before it ends.
TOUCHES = 1200
SUFFIXES = (".bin", ".idx", ".faults")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a corpus of two files, a fault now and then."""
    folder = tmp_path_factory.mktemp("corpus")
    hugging_face_folder(folder / "hf")
    source = random.Random(0)
    for name in ("a.jsonl", "b.jsonl"):
        words = [source.choice(("word", "naïve", "中文", "return", "def", "<s>", "\n")) for _ in range(125_000)]
        at = 0
        with (folder / name).open("w") as file:
            while at < len(words):
                size = source.randrange(1, 300)
                text = " ".join(words[at : at + size]) if source.random() < 0.98 else ""
                file.write(json.dumps({"text": text}) + "\n")
                at += size
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, bytes]:
    (folder / "out").mkdir()
    main(command(folder, folder / "out" / "undisturbed"))
    return contents(folder / "out" / "undisturbed")


def command(folder: Path, prefix: Path, workers: int = 1, shard_mb: float = 0.02) -> list[str]:
    """A run over about 1.5 MB of text in some 80 shards."""
    given = ["tokenize", "--input", str(folder / "*.jsonl"), "--output-prefix", str(prefix), "--on-error", "skip"]
    given += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "hf")]
    return [*given, "--workers", str(workers), "--shard-mb", str(shard_mb)]


def contents(prefix: Path) -> dict[str, bytes]:
    assert not prefix.with_name(prefix.name + ".sla-data").exists()
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES}


def test_workers_make_the_same_files(folder: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    assert undisturbed[".faults"].count(b"\n") > 10
    for workers in (2, 4):
        main(command(folder, tmp_path / str(workers), workers))
        assert contents(tmp_path / str(workers)) == undisturbed
    main(command(folder, tmp_path / "large", 1, shard_mb=0.5))
    assert contents(tmp_path / "large") == undisturbed


def started(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """``target(*arguments)`` in a process of its own that need not import anything again.

    It is a child of multiprocessing's server, which has no threads: one of this process, which has some, could find a
    lock held for ever.
    """
    begin_preloading()
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    return process


def status(process: BaseProcess) -> int | None:
    process.join(timeout=120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def killed_at_touch(number: int, arguments: list[str], prefix: Path) -> None:
    """``main(arguments)``, killed as it is about to touch one of its files for the ``number``-th time."""
    touches = 0

    def count(event: str, details: tuple) -> None:
        nonlocal touches
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(prefix) in str(details[0]):
            touches += 1
            if touches == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    main(arguments)


def test_sigkill_at_any_moment(folder: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """Each round ends with the same bytes; a round goes on from whatever the last kill left.

    Of every three kills two come before a file is made, renamed or removed, which no machine's speed moves; the third
    at any time, so that one may find a file half written.
    """
    source = random.Random(1)
    prefix = tmp_path / "out"
    arguments = command(folder, prefix)
    assert status(started(int)) == 0  # The server has imported all.
    begun = time.monotonic()
    assert status(started(main, arguments)) == 0
    whole = time.monotonic() - begun
    kills = rounds = 0
    shards_left: set[int] = set()
    while kills < KILLS:
        if contents_if_finished(prefix) is not None:
            rounds += 1
            assert contents(prefix) == undisturbed
            for path in tmp_path.glob("out*"):
                path.unlink()
        if kills % 3:
            process = started(killed_at_touch, source.randrange(1, TOUCHES), arguments, prefix)
        else:
            process = started(main, arguments)
            time.sleep(source.uniform(0, whole))
            process.kill()
        ended = status(process)
        assert ended in (0, -signal.SIGKILL), "the same command is refused"
        kills += ended != 0
        shards_left.add(len(finished_shards(tmp_path)))
    main(arguments)
    assert contents(prefix) == undisturbed
    assert rounds >= 2 and len(shards_left) >= 5, "the kills came at few different moments"


def finished_shards(folder: Path) -> list[Path]:
    return list(folder.glob("out.sla-data/shards/*.json"))


def contents_if_finished(prefix: Path) -> bytes | None:
    manifest, work = prefix.with_name(prefix.name + ".json"), prefix.with_name(prefix.name + ".sla-data")
    return manifest.read_bytes() if manifest.exists() and not work.exists() else None


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        direct = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return direct + [grandchild for child in direct for grandchild in children(child)]
    return []


def test_a_killed_worker_is_named(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As when memory runs out; what is finished counts when the command is given again."""
    shards = tmp_path / "out.sla-data" / "shards"

    def kill_one() -> None:
        while not list(shards.glob("*.json")):
            time.sleep(0.01)
        os.kill(children(forkserver._forkserver._forkserver_pid)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(SystemExit) as ended:
        main(command(folder, tmp_path / "out", workers=2))
    killer.join()
    assert ended.value.code == 2
    assert "a worker was ended (SIGKILL) at shard " in capsys.readouterr().err.splitlines()[-1]
    assert list(shards.glob("*.json"))
    main(command(folder, tmp_path / "out", workers=2))
    assert contents(tmp_path / "out") == undisturbed


def test_workers_end_with_the_process_they_work_for(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = command(folder, tmp_path / "out", workers=3)
    process = subprocess.Popen(
        [sys.executable, "-m", "sla_megatron.commands.data.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not finished_shards(tmp_path):
        assert process.poll() is None
        time.sleep(0.02)
    workers = children(process.pid)
    assert len(workers) >= 4
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.05)
    main(command(folder, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed


def test_a_full_disk(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One line; after there is space again, the same command goes on."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        arguments = command(folder, small / "out")
        for workers in (1, 2):
            with pytest.raises(SystemExit) as ended:
                main([*arguments, "--workers", str(workers)])
            assert ended.value.code == 2
            message = capsys.readouterr().err.splitlines()[-1]
            assert message == f"sla-data: error: {small}/out.sla-data (the same command goes on): no space left"
        finished = len(list(small.glob("out.sla-data/shards/*.json")))
        assert finished > 3 and not list(small.glob("out.[bi]*"))
        # Enough for the shards, not for the final files.
        size = sum(map(len, undisturbed.values()))
        subprocess.run(["mount", "-o", f"remount,size={int(size * 2.2)}", str(small)], check=True)
        with pytest.raises(SystemExit):
            main(arguments)
        assert not list(small.glob("out.[bi]*"))
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        main(arguments)
        assert contents(small / "out") == undisturbed
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_memory_does_not_grow_with_the_input(folder: Path, tmp_path: Path) -> None:
    """The most memory above the libraries, of one file and of ten times as much of it."""
    text = (folder / "a.jsonl").read_bytes()
    peaks = {}
    for times in (1, 10):
        (tmp_path / f"{times}").mkdir()
        (tmp_path / f"{times}" / "a.jsonl").write_bytes(text * times)
        (tmp_path / f"{times}" / "hf").symlink_to(folder / "hf")
        arguments = command(tmp_path / f"{times}", tmp_path / f"out{times}", shard_mb=0.2)
        ours, theirs = multiprocessing.Pipe(duplex=False)
        warm_up = command(folder, tmp_path / f"warm{times}", shard_mb=0.2)
        process = started(peak_of, theirs, warm_up, arguments)
        assert ours.poll(120), "it hangs"
        peaks[times] = ours.recv()
        assert status(process) == 0
    # 7 MB more of text.
    assert peaks[10] < peaks[1] + 3e6, peaks


def peak_of(connection: Connection, warm_up: list[str], arguments: list[str]) -> None:
    main(warm_up)
    Path("/proc/self/clear_refs").write_text("5")  # The peak is counted anew.
    before = memory("VmRSS")
    main(arguments)
    connection.send(memory("VmHWM") - before)


def memory(name: str) -> int:
    """Bytes of this process, by a name in its status."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024
