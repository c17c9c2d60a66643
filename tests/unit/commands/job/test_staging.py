"""Data that is staged to a node's own disk: what is copied, what the flags become, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import pytest

from sla_megatron.commands.job import cli
from sla_megatron.commands.job.staging import staged_flags


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four data sets, two of one name, a file of conversations, and files that list them."""
    folder = tmp_path / "data"
    for number, name in enumerate(("a/text", "b/text", "c", "d")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for suffix, size in ((".bin", 3000 + number), (".idx", 100)):
            path = folder / f"{name}{suffix}"
            path.write_bytes(bytes([number]) * size)
            os.utime(path, ns=(10**18, 10**18 + number))
    (folder / "talk.jsonl").write_text('{"messages": []}\n')
    (folder / "blend").write_text(f"0.3 {folder}/a/text\n0.7 {folder}/b/text\n")
    parts = {"train": f"1 {folder}/a/text 2 {folder}/b/text", "valid": [f"{folder}/c"], "test": None}
    (folder / "parts.json").write_text(json.dumps(parts))
    (folder / "counts.json").write_text(json.dumps({f"{folder}/a/text": 7, f"{folder}/c": 8}))
    return folder


def stage(to: Path, *flags: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["stage", "--run", "unused", "--to", str(to), "--", *map(str, flags)])
    return ended.value.code


class Blend(NamedTuple):
    """Flags of data, and the suffixes below the folder that are to be copied for them."""

    flags: list[str]
    sets: list[str]


BLENDS = {
    "one": Blend(["--data-path", "{}/c"], ["c"]),
    "with an equals sign": Blend(["--data-path={}/c"], ["c"]),
    "weights": Blend(["--data-path", "30", "{}/a/text", "7e-1", "{}/b/text"], ["a/text", "b/text"]),
    "two without weights": Blend(["--data-path", "{}/a/text", "{}/c"], ["a/text", "c"]),
    "three without weights": Blend(["--data-path", "{}/a/text", "{}/c", "{}/d"], ["a/text", "c", "d"]),
    "parts": Blend(
        ["--train-data-path", "1", "{}/c", "--valid-data-path", "{}/d", "--test-data-path", "{}/d"], ["c", "d"]
    ),
    "the last time counts": Blend(["--data-path", "{}/a/text", "--data-path", "{}/c"], ["c"]),
    "a list": Blend(["--data-args-path", "{}/blend"], ["a/text", "b/text"]),
    "lists of parts": Blend(["--per-split-data-args-path", "{}/parts.json"], ["a/text", "b/text", "c"]),
}


def blends(flags: list[str]) -> object:
    """What Megatron makes of them."""
    import argparse

    from megatron.training.utils import get_blend_and_blend_per_split

    parser = argparse.ArgumentParser()
    for name in ("data", "train-data", "valid-data", "test-data"):
        parser.add_argument(f"--{name}-path", nargs="*")
    for name in ("data-args", "per-split-data-args"):
        parser.add_argument(f"--{name}-path")
    found: Namespace = parser.parse_args(flags)
    return get_blend_and_blend_per_split(found)


@pytest.mark.parametrize("name", BLENDS)
def test_megatron_reads_the_copies_as_it_reads_the_sources(name: str, data: Path, tmp_path: Path) -> None:
    """The blend of the staged flags is that of the given ones, each prefix below the folder; only it is copied."""
    flags = [flag.format(data) for flag in BLENDS[name].flags]
    to = tmp_path / "disk"
    assert stage(to, *flags) == 0
    staged = staged_flags(["--num-layers", "4", *flags, "--sla"], to)
    assert (staged[:2], staged[-1:]) == (["--num-layers", "4"], ["--sla"])
    expected = json.dumps(blends(flags)).replace(str(data), f"{to}{data}")
    shutil.move(data, tmp_path / "gone")
    assert json.dumps(blends(staged[2:-1])) == expected and str(to) in expected
    copied = {path.relative_to(f"{to}{data}") for path in Path(f"{to}{data}").rglob("*.*") if path.suffix != ".json"}
    assert copied == {Path(f"{each}{suffix}") for each in BLENDS[name].sets for suffix in (".bin", ".idx")}
    for path in copied:
        assert (Path(f"{to}{data}") / path).read_bytes() == (tmp_path / "gone" / path).read_bytes()


def test_what_is_no_indexed_file(data: Path, tmp_path: Path) -> None:
    """Conversations are one file; object storage stays where it is; counts of sequences go by prefix."""
    to = tmp_path / "disk"
    flags = ["--sft", "--train-data-path", f"{data}/talk.jsonl", "--valid-data-path", "s3://bucket/valid"]
    assert stage(to, *flags) == 0
    assert Path(f"{to}{data}/talk.jsonl").read_text() == (data / "talk.jsonl").read_text()
    assert staged_flags(flags, to)[-1] == "s3://bucket/valid"
    flags = ["--data-path", f"{data}/c", "--per-dataset-sequences-path", f"{data}/counts.json"]
    assert stage(to, *flags) == 0
    counts = json.loads(Path(staged_flags(flags, to)[-1]).read_text())
    assert counts == {f"{to}{data}/a/text": 7, f"{to}{data}/c": 8}
    # What is below the folder already is not staged again, and a list that is there is somebody's own.
    assert staged_flags(staged_flags(flags, to), to) == staged_flags(flags, to)
    (to / "mine").write_text(f"{data}/d\n")
    assert stage(to, "--data-args-path", to / "mine") == 0
    assert (to / "mine").read_text() == f"{data}/d\n"


def test_a_second_attempt_copies_nothing(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """But for what has changed since, in size or in time."""
    to = tmp_path / "disk"
    flags = ["--data-path", f"{data}/a/text", f"{data}/c", f"{data}/d"]
    assert stage(to, *flags) == 0
    assert "0 kB of data are in" in capfd.readouterr().out
    there = Path(f"{to}{data}")
    inodes = {path: path.stat().st_ino for path in there.rglob("*.*")}
    assert len(inodes) == 6
    assert stage(to, *flags) == 0
    assert {path: path.stat().st_ino for path in there.rglob("*.*")} == inodes
    assert "9.3 kB of data are in" in capfd.readouterr().out
    (data / "c.bin").write_bytes(b"x" * 3002)
    (data / "d.idx").write_bytes(b"y" * 101)
    assert stage(to, *flags) == 0
    changed = {path.name for path, inode in inodes.items() if path.stat().st_ino != inode}
    assert changed == {"c.bin", "d.idx"}
    assert (there / "c.bin").read_bytes() == b"x" * 3002 and (there / "d.idx").read_bytes() == b"y" * 101
    # What an attempt that was killed left behind is overwritten.
    (there / "c.bin").unlink()
    (there / ".c.bin.unfinished").write_bytes(b"half")
    assert stage(to, *flags) == 0
    assert (there / "c.bin").read_bytes() == b"x" * 3002 and not list(there.rglob("*.unfinished"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data-path", "{}/none"], "data {}/none: expected {}/none.bin and {}/none.idx, to be copied"),
        (
            ["--data-args-path", "{}/none"],
            "--data-args-path {}/none: expected a file as Megatron reads it (No such file",
        ),
        (
            ["--per-split-data-args-path", "{}/blend"],
            "--per-split-data-args-path {}/blend: expected a file as Megatron",
        ),
    ],
)
def test_what_cannot_be_staged(
    flags: list[str], says: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """One line, and nothing is written."""
    assert stage(tmp_path / "disk", *[flag.format(data) for flag in flags]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"sla-job: error: {says.replace('{}', str(data))}") and said.count("\n") == 1
    assert not (tmp_path / "disk").exists()


def test_a_folder_that_is_another_on_each_node(capfd: pytest.CaptureFixture) -> None:
    assert stage(Path("disk"), "--data-path", "x") == 2
    assert capfd.readouterr().err == "sla-job: error: --to disk: expected an absolute path, the same on every node\n"


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="mounts a file system of its own")
def test_too_little_space(data: Path, tmp_path: Path) -> None:
    """On a real file system of 64 kB: both sizes, nothing is written; half of it fits."""
    (data / "c.bin").write_bytes(b"x" * 100_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"{sys.executable} -m sla_megatron.commands.job.cli stage --run x --to {disk}/here -- --data-path {data}"
    script = f"""
        mount -t tmpfs -o size=64k tmpfs {disk} || exit 99
        {command}/c; echo $?; ls -A {disk} | wc -l; {command}/d; echo $?; ls {disk}/here{data}
    """
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, timeout=60, env=os.environ
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr}")
    said = f"sla-job: error: --to {disk}/here: 100 kB of data are to be copied there, and 65.5 kB are free on "
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert done.stdout.split()[:2] == ["2", "0"] and done.stdout.split()[-3:] == ["0", "d.bin", "d.idx"]


def test_two_jobs_on_one_node(data: Path, tmp_path: Path) -> None:
    """One copies, the other waits for it and finds all there."""
    to = tmp_path / "disk"
    to.mkdir()
    command = [sys.executable, "-m", "sla_megatron.commands.job.cli", "stage", "--run", "x", "--to", str(to), "--"]
    with (to / ".staging").open("a") as lock:
        # Until both are there.
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = [
            subprocess.Popen([*command, "--data-path", f"{data}/c"], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for job in jobs:
            assert job.stdout.readline().endswith(f"waiting for another job that copies to {to}\n")
        assert not Path(f"{to}{data}").exists()
    found = sorted(job.communicate(timeout=60)[0] for job in jobs)
    assert [job.returncode for job in jobs] == [0, 0]
    assert "0 kB of data are in" in found[0] and "3.1 kB are to be copied" in found[0], found
    assert "3.1 kB of data are in" in found[1] and " 0 kB are to be copied" in found[1], found
