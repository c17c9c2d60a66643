"""The tests of parity, pipelines and hybrid models with the Megatron of a checkout: ``make test-upstream DIR=...``

python -m tests.support.upstream DIR [--short] [pytest's arguments ...]
python -m tests.support.upstream --revisions-of CLONE

DIR is a checkout of a supported version, as it stands there, changes and all; it is only read.  With --short, half a
minute of them.  --revisions-of: these, of each revision of a clone that the project says it was checked with, but for
those of the version that is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sla_megatron.commands.patch.checkout import Checkout
from sla_megatron.common.errors import StartError, one_line_errors

from .launch import ROOT

#: By the name of the line of development: what the project says it was checked with.  Tags by name, commits in full.
REVISIONS = {
    "0.19": "core_v0.19.0",
    "0.20": "d98e8a64ddf34856e74b24714e3bedb2f5a39553",
    "dev": "d48bd6be0a85cc0d6d3cc71e8750cf357cc6bdb1",
}

#: What the lines of development differ in.
TESTS = (
    "tests/test_parity.py",
    "tests/test_pipeline.py",
    "tests/test_hybrid.py",
    "tests/unit/upstream/test_adapters.py",
    "tests/unit/model/test_recomputation_fp8.py",
    "tests/unit/commands/convert/test_argument_tables.py",
    "tests/unit/commands/patch/test_registry.py::test_every_name_fits_the_installed_upstream",
)

#: Every adapter is met: attention's other parameter, the class of a configuration, full recomputation, process groups.
SHORT = (
    "tests/test_parity.py::test_logits_and_every_gradient[qk-norm-recompute]",
    "tests/test_parity.py::test_logits_and_every_gradient[no-bias-pruned]",
    "tests/test_pipeline.py::test_trains_as_without_a_pipeline[mha-pruned-two-long-pp2v2]",
    "tests/test_pipeline.py::test_bytes_on_the_wire_are_the_lower_bound[mha-pruned-two-long-pp2v2]",
    "tests/unit/upstream/test_adapters.py",
    "tests/unit/commands/patch/test_registry.py::test_every_name_fits_the_installed_upstream",
)


def main() -> None:
    """Run the tests: their exit status, or 2 and one line where DIR is no checkout of a supported version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", metavar="DIR", nargs="?")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--revisions-of", metavar="CLONE")
    arguments, further = parser.parse_known_args()
    with one_line_errors("test-upstream", all_ranks=True):
        if arguments.revisions_of:
            sys.exit(run_revisions(Path(arguments.revisions_of)))
        if not arguments.checkout:
            raise StartError("no checkout, expected DIR=/path/to/a/Megatron-LM")
        sys.exit(run_checkout(Path(arguments.checkout), [*(SHORT if arguments.short else TESTS), *further]))


def run_revisions(clone: Path) -> int:
    """The short tests, of each revision of ``clone`` but the installed version's: the first status that is not 0."""
    if not (clone / ".git").exists() and not (clone / "objects").exists():
        print(f"with other versions of Megatron: skipped, {clone} is no clone of NVIDIA/Megatron-LM")
        return 0
    status = 0
    for line, revision in REVISIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            if not check_out(clone, revision, Path(folder) / "Megatron-LM"):
                print(f"with Megatron {line}: skipped, {clone} does not have {revision}")
            elif line != "0.19":
                print(f"with Megatron {line}, {revision}:", flush=True)
                status = status or run_checkout(Path(folder) / "Megatron-LM", SHORT)
    return status


def check_out(clone: Path, revision: str, folder: Path) -> bool:
    """A clean checkout of ``revision`` in ``folder``, which shares objects with ``clone``; whether there is one."""
    git = ["git", "clone", "--quiet", "--shared", "--no-checkout", str(clone), str(folder)]
    subprocess.run(git, check=True)
    return subprocess.run(["git", "checkout", "--quiet", revision], cwd=folder, capture_output=True).returncode == 0


def compiled_helpers() -> list[Path]:
    """The dataset helpers of the installed Megatron, which a checkout would compile."""
    return list((Path(importlib.util.find_spec("megatron.core").origin).parent / "datasets").glob("helpers_cpp*.so"))


def run_checkout(folder: Path, words: Sequence[str]) -> int:
    """pytest's exit status for ``words``, with the Megatron of ``folder``."""
    print(f"{folder}: {Checkout(folder).description}", flush=True)
    with tempfile.TemporaryDirectory() as copy:
        megatron = Path(copy) / "megatron"
        shutil.copytree(folder / "megatron", megatron, ignore=shutil.ignore_patterns("__pycache__"))
        # With compiled helpers and no Makefile nothing is made, as from a wheel.
        (megatron / "core/datasets/Makefile").unlink(missing_ok=True)
        for helpers in compiled_helpers():
            shutil.copyfile(helpers, megatron / "core/datasets" / helpers.name)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), copy])}
        return subprocess.run([sys.executable, "-m", "pytest", "-q", *words], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    main()
