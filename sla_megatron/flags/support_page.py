"""Write ``docs/support.md`` from the table in ``support.py`` and what the checks of the flags say, and nothing else.

    python -m sla_megatron.flags.support_page            # writes it
    python -m sla_megatron.flags.support_page --check    # ends with status 1 where it is not what these say

Every command line of the table is settled as a run's flags are, with ``--sla``; needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from warnings import catch_warnings

from ..common.errors import FlagError, StartError
from ..common.files import write_whole
from ..common.silence import silence
from ..cpu.device import add_device_arg, megatron_device
from .families import OF_OTHER_VERSIONS, UNTESTED, Family
from .support import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"

#: The run that flags are added to, on mock data unless they name others.
BASE = (
    "--sla --num-layers 12 --hidden-size 48 --num-attention-heads 12 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --train-iters 2 --lr 1e-3 --eval-interval 1 --tokenizer-type NullTokenizer --vocab-size 255"
)

HEAD = """\
# What is supported

Written by `python -m sla_megatron.flags.support_page` from [a table](../sla_megatron/flags/support.py) and from what
the checks of the flags say. Each line of flags stands beside `--sla`; what is refused ends a run before anything is
written, with the line that is shown and exit status 2. [Flags](flags.md) has what Megatron itself does not do, with
`--sla` or without.

`works`: the test shows it on CPUs, on gloo, in every CI run, mostly with Megatron's own trainer. `works, GPU check not
run`: only a GPU can show the rest of it; the check is there, and was not run.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="compare with --out, write nothing")
    args = parser.parse_args(argv)
    os.environ["RANK"] = "0"
    with catch_warnings(action="ignore"), megatron_device(["--device", "cpu"]):
        text = page(FAMILIES)
    if not args.check:
        write_whole(args.out, text)
        print("written:", args.out)
    elif not args.out.is_file() or args.out.read_text() != text:
        sys.exit(f"{args.out} is not what the table says: run python -m sla_megatron.flags.support_page")


def page(families: Sequence[Family]) -> str:
    """The page's text; within the CPU backend.  Raises ``ValueError`` where the checks say another thing."""
    said = {flags: refusal(flags) for family in families for flags in (*family.accepted, *family.refused)}
    if found := faults(families, said):
        raise ValueError("; ".join(found))
    works = [family for family in families if not family.is_refused]
    refused = [family for family in families if family.is_refused]
    parts = [HEAD, "## Works\n", _table(("family", "flags", "state"), _working(works))]
    header = ("family", "flags", "because")
    parts += ["## Refused\n", _table(header, _refusals(refused, said))]
    parts += ["## Refused of what works\n", _table(header, _refusals(works, said))]
    parts += [
        "## Without a test\n",
        f"Of these groups of `sla-pretrain --help` no flag is above: {', '.join(UNTESTED)}.\n",
    ]
    return "\n".join(parts)


def faults(families: Sequence[Family], said: Mapping[str, StartError | None]) -> list[str]:
    """Flags that are refused and should not be, or are not, or by Megatron alone, and should be.

    Args:
        families: the table.
        said: :func:`refusal` of each of its command lines.
    """
    wrong = [(family, flags) for family in families for flags in family.accepted if said[flags] is not None]
    wrong += [
        (family, flags) for family in families for flags in family.refused if not isinstance(said[flags], FlagError)
    ]
    return [
        f"{family.name}: {flags}: {'is not refused' if said[flags] is None else said[flags].reason}"
        for family, flags in wrong
    ]


def in_words(flags: str) -> tuple[dict[str, str], list[str]]:
    """The variables of the environment, and all flags, of a run with ``flags`` beside :data:`BASE`."""
    variables = [word for word in flags.split() if "=" in word and not word.startswith("-")]
    words = [word for word in flags.split() if word not in variables]
    data = [] if "--data-path" in words else ["--mock-data"]
    words = [*BASE.split(), *data, *words]
    return dict(word.split("=") for word in variables), words


def refusal(flags: str) -> StartError | None:
    """What a run on GPUs says that has ``flags`` beside :data:`BASE`; ``None`` where they are accepted."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    from .arguments import megatron_refusals, settled_args
    from .asked import fewest_gpus
    from .entry_point import require_pretraining

    def check(args: Namespace) -> None:
        args.rank, args.world_size = 0, fewest_gpus(args)
        # What is not installed here says nothing about the run's machine.
        require_pretraining(args, packages=False)
        # Megatron's default, which needs Transformer Engine here.
        args.apply_rope_fusion = False

    variables, argv = in_words(flags)
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        args = settled_args(_with_flags_of_others, check=check, will_run_here=False, argv=argv, silent=True)
        with silence(), megatron_refusals():
            core_transformer_config_from_args(args)
    except StartError as error:
        return error
    finally:
        os.environ.clear()
        os.environ.update(before)
    return None


def _with_flags_of_others(parser: ArgumentParser) -> ArgumentParser:
    """``parser`` with the flags that another Megatron has, unless this one has them."""
    for flag, has_value in OF_OTHER_VERSIONS.items():
        if flag not in parser._option_string_actions:
            parser.add_argument(flag, **({"nargs": "+"} if has_value else {"action": "store_true"}))
    return add_device_arg(parser)


def _working(families: Sequence[Family]) -> Iterator[tuple[str, ...]]:
    for family in families:
        state = "works, GPU check not run" if family.gpu_checks else "works"
        named = ", ".join(f"`{test}`" for test in (*family.gpu_checks, *family.tests))
        yield family.name, "<br>".join(f"`{flags}`" for flags in family.flags), f"{state}: {named}"


def _refusals(families: Sequence[Family], said: Mapping[str, StartError | None]) -> Iterator[tuple[str, ...]]:
    for family in families:
        for number, flags in enumerate(family.refused):
            yield "" if number else family.name, f"`{flags}`", said[flags].reason


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    # A bar within a cell would end it.
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
