"""Commands answer at once: nothing heavy is imported for help, for an unknown command or for an unknown flag."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: Importing one of these takes a second or more.
HEAVY = ("torch", "megatron", "transformers", "datasets", "matplotlib", "tokenizers")


def console_scripts() -> dict[str, str]:
    """Name -> ``module:function``, of setup.py."""
    constants = [
        node.value for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Constant)
    ]
    return dict(
        text.split(" = ") for text in constants if isinstance(text, str) and text.startswith("sla-") and " = " in text
    )


SCRIPTS = console_scripts()
#: Those that have commands of their own; the others take pretraining's flags.
WITH_COMMANDS = ("sla-convert", "sla-data", "sla-job", "sla-patch", "sla-sweep")


def started(script: str, *argv: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The command in a process of its own, and which of :data:`HEAVY` it imported."""
    module, _, function = SCRIPTS[script].partition(":")
    code = f"""
import importlib, sys
sys.argv = {[script, *argv]!r}
try:
    importlib.import_module({module!r}).{function}()
finally:
    print("imported:", *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    *said, imported = done.stderr.splitlines()
    done.stderr = "".join(f"{line}\n" for line in said)
    return done, imported.split()[1:]


def test_all_nine_are_known() -> None:
    assert len(SCRIPTS) == 9


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    """Of the entry point's own flags; all other commands' whole help."""
    done, imported = started(script, "--help-sla" if script == "sla-pretrain" else "--help")
    assert (done.returncode, imported) == (0, []), done.stderr
    assert done.stdout.startswith(f"usage: {script} ")
    if script in ("sla-pretrain", "sla-plan"):
        assert "--sla-skip-distance" in done.stdout


@pytest.mark.parametrize("script", WITH_COMMANDS)
@pytest.mark.parametrize("argv", [["no-such-command"], ["--no-such-flag"], []], ids=["command", "flag", "nothing"])
def test_what_a_command_does_not_know(script: str, argv: list[str]) -> None:
    """One line that begins with the command's name, and status 2."""
    done, imported = started(script, *argv)
    assert (done.returncode, imported, done.stdout) == (2, [], "")
    assert done.stderr.startswith(f"{script}: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in argv if not word.startswith("--"))


@pytest.mark.parametrize("script", ["sla-pretrain", "sla-plan"])
@pytest.mark.parametrize(
    ("flag", "known"),
    [
        ("--sla-skip-distanc", "--sla-skip-distance"),
        ("--sla-layer", "--sla-layers"),
        ("--sla-kv-project", "projection"),
    ],
)
def test_a_mistyped_flag_of_ours(script: str, flag: str, known: str) -> None:
    """The nearest known ones are named, without a word from Megatron."""
    done, imported = started(script, "--sla", flag, "3", "--num-layers", "4")
    assert (done.returncode, imported, done.stdout) == (2, [], "")
    name = "sla-megatron" if script == "sla-pretrain" else script
    assert done.stderr.startswith(f"{name}: error: {flag} 3: expected a known flag, such as --sla-")
    assert known in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["sla-sweep", "task", "g.yaml", "--out", "x", "--index", "one"], "--index one: expected an integer"),
        (
            ["sla-sweep", "run", "g.yaml", "--out", "x", "--device", "tpu"],
            "--device tpu: expected one of auto, cpu, cuda",
        ),
        (["sla-sweep", "run", "g.yaml", "--oot", "x", "--out", "y"], "--oot x: expected a known flag, such as --out"),
        (["sla-job", "end", "--run", "x", "--status"], "--status without a value: expected one value"),
        (
            ["sla-convert", "verify", "a", "b", "--treshold", "1"],
            "--treshold 1: expected a known flag, such as --threshold",
        ),
        (
            ["sla-convert", "megatron-to-hf", "a", "b", "--max-shard-size", "5"],
            "--max-shard-size 5: expected a size such",
        ),
        (
            ["sla-data", "tokenize", "--wrkers", "4", "--output-prefix", "x"],
            "--wrkers 4: expected a known flag, such as --workers",
        ),
        (
            ["sla-data", "tokenize", "--output-prefix", "x", "--workers", "0"],
            "--workers 0: expected a number from 1 to 1024",
        ),
        (["sla-plan", "--num-gpus", "none"], "--num-gpus none: expected an integer >= 1"),
        (["sla-doctor", "--device", "tpu"], "--device tpu: expected one of auto, cpu, cuda"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_bad_flags_of_every_command(argv: list[str], line: str) -> None:
    """Flag, value, what is accepted, under the command's own name."""
    done, imported = started(*argv)
    assert (done.returncode, imported, done.stdout) == (2, [], "")
    assert done.stderr.count("\n") == 1 and line in done.stderr, done.stderr
    assert done.stderr.startswith(argv[0]) and ": error: " in done.stderr


def test_what_takes_long_says_so_first() -> None:
    """Megatron is imported for what these flags mean: that is said meanwhile, in lines of their own."""
    done, imported = started("sla-plan", "--num-layers", "4")
    assert "megatron" in imported and done.returncode == 2
    first, *_, last = done.stderr.splitlines()
    assert first == "sla-plan: asking Megatron what the flags mean, 0 s"
    assert last.startswith("sla-plan: error: "), done.stderr
