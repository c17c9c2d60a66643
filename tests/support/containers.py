"""Stand-ins for apptainer and for pyxis' srun: they accept what these are documented to take, and run what is to be in
the container with an environment of an image's own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

#: Of pyxis' srun, from the help that its options have there; with a value or without one.
PYXIS = {
    "--container-image": True,
    "--container-mounts": True,
    "--container-workdir": True,
    "--container-name": True,
    "--container-save": True,
    "--container-env": True,
    "--container-mount-home": False,
    "--no-container-mount-home": False,
    "--container-remap-root": False,
    "--no-container-remap-root": False,
    "--container-entrypoint": False,
    "--no-container-entrypoint": False,
    "--container-writable": False,
    "--container-readonly": False,
}

#: Of ``apptainer exec``, those that a job may want.
APPTAINER = {"--nv": False, "--bind": True, "-B": True, "--pwd": True, "--env": True, "--writable-tmpfs": False}


def install(folder: Path, record: Path, real_srun: str) -> None:
    """``srun`` and ``apptainer`` in ``folder``, which write each call of theirs to ``record``; and what an image has:
    ``python3``, and a PYTHONPATH.
    """
    for name in ("srun", "apptainer"):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} {folder} {record} {real_srun} "$@"\n')
        path.chmod(0o755)
    image = folder / "image" / "bin"
    image.mkdir(parents=True)
    (image / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (image / "python3").chmod(0o755)


def recorded(record: Path) -> list[dict]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def _main(name: str, folder: str, record: str, real_srun: str, *words: str) -> None:
    options, rest = (_apptainer if name == "apptainer" else _pyxis)(list(words))
    image = ["env", f"PATH={folder}/image/bin:{os.environ['PATH']}", "PYTHONPATH=/image/own"]
    step = next((word.partition("=")[2] for word in words if word.startswith("--job-name=")), None)
    if options:
        mounts = options.get("--bind") or options.get("--container-mounts", "")
        for mount in mounts.split(","):
            source, target = (*mount.split(":"), mount.split(":")[0])[:2]
            if source not in ("tmpfs", "umount") and not os.path.isabs(source) or not os.path.isabs(target):
                sys.exit(f"{name}: a mount that is not absolute: {mount}")
            if os.path.isabs(source) and not os.path.exists(source):
                sys.exit(f"{name}: no such file or directory: {source}")
        workdir = options.get("--pwd") or options.get("--container-workdir")
        os.chdir(workdir)
        with open(record, "a") as file:
            file.write(json.dumps({"step": step, "options": options}) + "\n")
    if name == "apptainer":
        command = [*image, *rest]
    else:
        # srun's options all begin with a dash here.
        at = next(number for number, word in enumerate(rest) if not word.startswith("-"))
        command = [real_srun, *rest[:at], *(image if options else []), *rest[at:]]
    os.execvp(command[0], command)


def _pyxis(words: list[str]) -> tuple[dict[str, str], list[str]]:
    options, rest = {}, []
    for number, word in enumerate(words):
        if not word.startswith("-"):
            return options, rest + words[number:]
        flag, equals, value = word.partition("=")
        if "container" not in flag:
            rest.append(word)
        elif PYXIS.get(flag) is not bool(equals) or flag in options:
            sys.exit(f"srun: unrecognized option or value: {word}")
        else:
            options[flag] = value
    return options, rest


def _apptainer(words: list[str]) -> tuple[dict[str, str], list[str]]:
    if words.pop(0) != "exec":
        sys.exit("apptainer: expected exec")
    options = {}
    while words[0].startswith("-"):
        flag, equals, value = words.pop(0).partition("=")
        if flag not in APPTAINER:
            sys.exit(f"apptainer: unknown flag: {flag}")
        options[flag] = value if equals or not APPTAINER[flag] else words.pop(0)
    options["image"] = words.pop(0)
    return options, words


if __name__ == "__main__":
    _main(*sys.argv[1:])
