"""Whether the flags, subcommands and targets of documented commands are those that the commands know."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from sla_megatron.common.flag_types import known_flags

from ..launch import ROOT
from .parsers import BESIDE_A_RUN, TRAINING, parser_of, sbatch_flags, subcommands, training_flags
from .shell import Command, documented_commands

MAKEFILE = (ROOT / "Makefile").read_text()

#: Command -> module, as setup.py has them.
CONSOLE = dict(re.findall(r'"(sla-[a-z]+) = ([a-z_.]+):main"', (ROOT / "setup.py").read_text()))
LAUNCHERS = ("launch/local.sh", "launch/slurm.sbatch")

#: Flags that pages name and that are of other programs: docker, srun and sbatch's script, transformers, vllm.
OF_OTHERS = frozenset(
    "--ipc --shm-size --cpu-bind --open-mode --container-image --container-mounts --container-name "
    "--continuous-batching --quantization".split()
)

_FLAG = re.compile(r"(--?[A-Za-z][\w-]*)(=.*)?", re.DOTALL)


def unknown_words(root: Path) -> list[str]:
    """Of every command in the markdown files of ``root``, and of flags that stand there alone."""
    found = list(documented_commands(root))
    return [f"{command.place}: {fault}" for command in found for fault in (*faults(command), *_faults_alone(command))]


def _faults_alone(command: Command) -> Iterator[str]:
    if command.words[0].startswith("--") and command.is_typed:
        yield from _unknown("any command", [word for word in command.words if not word.endswith("*")], _all_flags())


@functools.cache
def _all_flags() -> frozenset[str]:
    """Of every command that this project's own pages name."""
    modules = set(CONSOLE.values())
    for command in documented_commands(ROOT):
        modules.update(filter(None, (_module(command.words[:end]) for end in range(1, len(command.words) + 1))))
    flags = (known_flags(parser_of(module)) for module in sorted(modules - set(TRAINING)) if _is_there(module))
    return training_flags().union(sbatch_flags() or (), OF_OTHERS, *flags)


def _is_there(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def faults(command: Command) -> Iterator[str]:
    """Of one command, or none if it is not this project's."""
    words = command.words
    if words[0] == "make" and command.is_typed:
        yield from _faults_of_make(words[1:])
    for number, word in enumerate(words):
        if word == "sbatch":
            # As far as the script.
            options = words[number + 1 :]
            end = next((at for at, option in enumerate(options) if option.endswith(".sbatch")), len(options))
            yield from _unknown("sbatch", options[:end], sbatch_flags())
        elif module := _module(words[: number + 1]):
            yield from _faults_of(" ".join(words[: number + 1]), module, words[number + 1 :])
            return


def _module(words: Sequence[str]) -> str | None:
    """The module that the last of ``words`` starts."""
    word = words[-1]
    if word.endswith(LAUNCHERS):
        return TRAINING[0]
    if word.rpartition("/")[2] in CONSOLE:
        return CONSOLE[word.rpartition("/")[2]]
    if words[-2:-1] == ("-m",) and word.startswith(("benchmarks.", "examples.", "sla_megatron.", "tests.support.")):
        # NAME and the like stand for one.
        return None if re.search("[A-Z]", word) else word
    if words[-2:-1] == ("python",) and re.fullmatch(r"(benchmarks|examples)/[a-z_/]+\.py", word):
        return word.removesuffix(".py").replace("/", ".")
    return None


def _faults_of(shown: str, module: str, words: Sequence[str]) -> Iterator[str]:
    own, behind = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, ())
    if module in TRAINING:
        yield from _unknown(shown, words, training_flags())
        return
    if not _is_there(module):
        yield f"{shown}: there is no such module"
        return
    parser = parser_of(module)
    known = frozenset(known_flags(parser))
    if module in BESIDE_A_RUN:
        known |= training_flags()
    # lm-eval's command works without one, too.
    elif (choices := subcommands(parser)) and (name := next(iter(own), "")) and not name.startswith("-"):
        if name in choices:
            known = frozenset(known_flags(choices[name]))
        elif re.fullmatch("[a-z-]+", name):
            yield f"{shown} {name}: expected {', '.join(choices)}"
    yield from _unknown(shown, own, known)
    # Behind -- are flags of a run, or options of what is submitted.
    yield from _unknown(shown, behind, training_flags() if module.endswith(".job.cli") else sbatch_flags())


def _faults_of_make(words: Sequence[str]) -> Iterator[str]:
    targets = re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)
    for word in words:
        name, is_variable, value = word.partition("=")
        if is_variable and not re.search(rf"^{re.escape(name)} [?:]=", MAKEFILE, re.MULTILINE):
            yield f"make {word}: the Makefile has no {name}"
        elif is_variable and (module := re.search(rf"\$\(RUN\) (\S+) .*\$\({name}\)", MAKEFILE)):
            if not module[1].startswith("pytest"):
                yield from _faults_of(f"make {name}=", module[1], shlex.split(value))
        elif re.fullmatch("[a-z-]+", name) and not is_variable and name not in targets:
            yield f"make {word}: expected {', '.join(targets)}"


def _unknown(shown: str, words: Sequence[str], known: frozenset[str] | None) -> Iterator[str]:
    for word in words:
        # Brackets are around what may be left out, and dots stand for more.
        match = _FLAG.fullmatch(word.strip("[]"))
        if known is not None and match and "..." not in word and match[1] not in known:
            yield f"{shown}: {match[1]}: no flag of it"
