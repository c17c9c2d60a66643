"""The flags of ``sla-plan`` beside those of pretraining."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from pathlib import Path

from ...common.errors import FlagError
from ...common.figures import fault_of_plot
from ...common.files import fault_of_file
from ...common.flag_types import WITH_VALUE, file_name, number
from ...common.replacing import named_by_flags
from .predict import Rates

PLOT_SUFFIXES = (".png", ".svg")
DRAW_SUFFIX = ".svg"

#: The value of ``--json``, and of ``--draw``, for the standard output.
STDOUT = "-"


def add_plan_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags to ``parser`` and return it."""
    group = parser.add_argument_group("sla-plan", "what skip-layer attention costs in this run; needs no GPU")
    group.add_argument(
        "--num-gpus",
        type=number("--num-gpus", int, "an integer >= 1"),
        **_WITH_VALUE,
        help="GPUs of the run (the world size). Default: the fewest that the parallel sizes allow.",
    )
    group.add_argument(
        "--link-gb-per-s",
        type=number("--link-gb-per-s", float, "gigabytes a second, more than 0"),
        **_WITH_VALUE,
        help="Bandwidth between neighbouring pipeline ranks, for each GPU and direction, in gigabytes (1e9 bytes) a "
        "second. With --compute-tflops it has a step simulated.",
    )
    group.add_argument(
        "--link-latency-us",
        type=number("--link-latency-us", float, "microseconds, 0 or more", least=0),
        **_WITH_VALUE,
        help="Microseconds that a transfer takes beside its bytes. Default: 0.",
    )
    group.add_argument(
        "--link-half-duplex",
        action="store_true",
        help="Links carry one direction at a time: what 1F1B sends and receives at once takes the sum of both. So are "
        "gloo's where point-to-point communication is batched.",
    )
    group.add_argument(
        "--compute-tflops",
        type=number("--compute-tflops", float, "TFLOP/s, more than 0"),
        **_WITH_VALUE,
        help="What each GPU achieves on this model, in 1e12 floating-point operations a second, its tensor-parallel "
        "communication included: the throughput that Megatron logs for a run without pipeline parallelism.",
    )
    group.add_argument(
        "--suggest",
        action="store_true",
        help="Rank pipeline sizes and virtual stages for this model, batch and number of GPUs: by predicted step time "
        "where rates are given, else by K/V bytes on the wire.",
    )
    _add_outputs(group)
    return parser


def _add_outputs(group: _ArgumentGroup) -> None:
    """Where figures and pictures go."""
    group.add_argument(
        "--plot",
        type=file_name("--plot"),
        **_WITH_VALUE,
        help="Draw the simulated timeline to this .png or .svg file.",
    )
    group.add_argument(
        "--draw",
        type=file_name("--draw"),
        **_WITH_VALUE,
        help="Draw who reads whose keys and values, layer by layer and group by group, to this .svg file; - writes it "
        "as a table to the standard output, in place of the others.",
    )
    group.add_argument(
        "--json",
        type=file_name("--json"),
        **_WITH_VALUE,
        help="Write every figure, exact, to this file; - writes it to the standard output in place of the tables.",
    )
    group.add_argument("--overwrite", action="store_true", help="Let --plot, --draw and --json replace a file.")


def check_plan_args(args: Namespace) -> None:
    """What needs no model.  Raises :class:`FlagError`."""
    both = "beside it: a step is simulated from both"
    if args.compute_tflops is None and args.link_gb_per_s is not None:
        raise FlagError("--link-gb-per-s", f"{args.link_gb_per_s:g}", f"--compute-tflops {both}")
    if args.link_gb_per_s is None and args.compute_tflops is not None:
        raise FlagError("--compute-tflops", f"{args.compute_tflops:g}", f"--link-gb-per-s {both}")
    if args.link_latency_us is not None and args.link_gb_per_s is None:
        latency = f"{args.link_latency_us:g}"
        raise FlagError("--link-latency-us", latency, "--link-gb-per-s and --compute-tflops beside it")
    if args.link_half_duplex and args.link_gb_per_s is None:
        raise FlagError("--link-half-duplex", True, "--link-gb-per-s and --compute-tflops beside it")
    if args.plot is not None:
        _check_plot(args)
    if args.draw not in (None, STDOUT):
        _check_draw(args)
    if args.json not in (None, STDOUT):
        expected = fault_of_file(Path(args.json), args.overwrite, named_by_flags(sys.argv[1:]))
        if expected is None:
            expected = _fault_of_same(args.json, {"--plot": args.plot, "--draw": args.draw})
        if expected is not None:
            raise FlagError("--json", args.json, expected)
    if args.draw == args.json == STDOUT:
        raise FlagError("--draw", STDOUT, "a file: --json has the standard output")


def rates(args: Namespace) -> Rates | None:
    """The rates that were given, in bytes, operations and seconds."""
    if args.link_gb_per_s is None:
        return None
    latency = (args.link_latency_us or 0) / 1e6
    return Rates(args.link_gb_per_s * 1e9, args.compute_tflops * 1e12, latency, args.link_half_duplex)


def _check_draw(args: Namespace) -> None:
    path = Path(args.draw)
    if path.suffix.lower() != DRAW_SUFFIX:
        expected = f"a file name that ends in {DRAW_SUFFIX}, or {STDOUT}"
    else:
        expected = fault_of_file(path, args.overwrite, named_by_flags(sys.argv[1:]))
    if (expected := expected or _fault_of_same(args.draw, {"--plot": args.plot})) is not None:
        raise FlagError("--draw", args.draw, expected)


def _fault_of_same(name: str, others: dict[str, str | None]) -> str | None:
    """What to expect where another flag, of ``others``, names the same file."""
    for flag, other in others.items():
        if other not in (None, STDOUT) and Path(other).absolute() == Path(name).absolute():
            return f"another file than {flag}"
    return None


def _check_plot(args: Namespace) -> None:
    expected = fault_of_plot(Path(args.plot), PLOT_SUFFIXES, args.overwrite, named_by_flags(sys.argv[1:]))
    if expected is not None:
        raise FlagError("--plot", args.plot, expected)
    if args.link_gb_per_s is None:
        raise FlagError("--plot", args.plot, "--link-gb-per-s and --compute-tflops beside it, to have a step to draw")


_WITH_VALUE = {**WITH_VALUE, "metavar": "VALUE"}
