"""``sla-convert``: Megatron checkpoints to Hugging Face folders and back, exactly, without a GPU.

sla-convert megatron-to-hf checkpoints exported --verify
sla-convert megatron-to-hf dense-checkpoints exported --as llama
sla-convert hf-to-megatron exported checkpoints-again
sla-convert prune exported pruned
sla-convert dense-to-sla dense-checkpoints sla-checkpoints --sla-skip-distance 9
sla-convert dense-to-sla llama sla-checkpoints --sla-share values --sla-source-layer 1 --sla-num-skip-groups 0.5
sla-convert gpt-to-hybrid checkpoints hybrid-checkpoints --hybrid-layer-pattern '*-*-*-*-'
sla-convert hybrid-to-gpt hybrid-checkpoints gpt-checkpoints
sla-convert describe checkpoints
sla-convert verify checkpoints exported
"""

from __future__ import annotations

import argparse
import ast
import gc
import re
import sys
from pathlib import Path
from typing import Any

from ...common.errors import FlagError, one_line_errors
from ...common.flag_types import OneLineParser
from ...flags.sla_flags import add_skipping

_SHARD_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

#: What a model can be exported as: each ``model_type`` that is known, named here as importing the table takes seconds.
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "sla_gpt")


def main() -> None:
    """Run one command.  What cannot be done ends it: one line on stderr, exit status 2; logits that differ, 1."""
    # What imports make stays: to look through it for garbage, time and again, takes a tenth of a small conversion.
    gc.disable()
    try:
        with one_line_errors("sla-convert", all_ranks=True):
            args = _parser().parse_args()
            status = args.command(args)
    finally:
        gc.enable()
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="sla-convert", description=__doc__, formatter_class=_Raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    export = commands.add_parser("megatron-to-hf", help="a checkpoint, however it was sharded, to a folder")
    export.add_argument("checkpoint", type=Path, help="the --save folder, or one iter_* of it")
    export.add_argument("out", type=Path)
    _add_form(export)
    _add_shard_size(export)
    export.add_argument(
        "--special-tokens-as-text",
        action="store_true",
        help="of a sentencepiece tokenizer: </s> and the like in a text stay text, as in pretraining",
    )
    _add_checkpoint_options(export)
    _add_output_options(export)
    export.set_defaults(command=_megatron_to_hf)

    back = commands.add_parser(
        "hf-to-megatron", help="our export, or a dense model of Llama's family or GPT-2, to a checkpoint"
    )
    back.add_argument("hf", type=Path)
    back.add_argument("out", type=Path)
    _add_output_options(back)
    back.set_defaults(command=_hf_to_megatron)

    slim = commands.add_parser("prune", help="a full export without the rows of its K/V weights that nobody reads")
    slim.add_argument("export", type=Path)
    slim.add_argument("out", type=Path)
    _add_shard_size(slim)
    _add_output_options(slim)
    slim.set_defaults(command=_prune)

    start = commands.add_parser(
        "dense-to-sla",
        help="a dense checkpoint, or Hugging Face folder, to a checkpoint that pretraining goes on from with --sla",
    )
    start.add_argument("model", type=Path)
    start.add_argument("out", type=Path)
    add_skipping(start.add_argument_group("skip-layer attention", "as in pretraining"))
    _add_checkpoint_options(start)
    _add_output_options(start, verify=False)
    start.set_defaults(command=_dense_to_sla)

    _add_kinds(commands)

    show = commands.add_parser("describe", help="the architecture of a checkpoint or folder, and how tensors map")
    show.add_argument("model", type=Path)
    _add_checkpoint_options(show)
    show.set_defaults(command=_describe)

    check = commands.add_parser("verify", help="compare logits of a checkpoint and a folder on random tokens")
    check.add_argument("checkpoint", type=Path)
    check.add_argument("hf", type=Path)
    _add_checkpoint_options(check)
    check.set_defaults(command=lambda args: _compare(args, _checkpoint(args, args.checkpoint), args.hf))
    check.add_argument("--threshold", type=float, help="largest relative error; default 1e-5")
    return parser


def _add_kinds(commands: Any) -> None:
    hybrid = commands.add_parser("gpt-to-hybrid", help="a GPT's checkpoint to a hybrid model's: --load starts from it")
    hybrid.add_argument("checkpoint", type=Path)
    hybrid.add_argument("out", type=Path)
    hybrid.add_argument(
        "--hybrid-layer-pattern",
        required=True,
        metavar="PATTERN",
        help="its i-th * and i-th - or E are the GPT's layer i, such as '*-*-' for two layers",
    )
    _add_overwrite(hybrid)
    hybrid.set_defaults(command=_gpt_to_hybrid)

    gpt = commands.add_parser("hybrid-to-gpt", help="the reverse, of attention and MLP (or expert) layers in turn")
    gpt.add_argument("checkpoint", type=Path)
    gpt.add_argument("out", type=Path)
    _add_overwrite(gpt)
    gpt.set_defaults(command=_hybrid_to_gpt)


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def _add_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--as",
        dest="kind",
        choices=KINDS,
        help="of a dense model: the folder's model_type, and class; default: the one of these that it is, such as "
        "llama, or else sla_gpt, the format with code of its own",
    )
    parser.add_argument("--prune", action="store_true", help="of a full model: without the K/V rows that nobody reads")


def _add_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-shard-size", type=_shard_bytes, default="5GB", help="such as 500MB; default 5GB")


def _add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="where the tokenizer's model is now, if it is neither in nor beside the checkpoint",
    )
    parser.add_argument(
        "--drop-mtp",
        action="store_true",
        help="leave out the layers that predict further tokens (--mtp-num-layers); without, such a checkpoint is "
        "refused",
    )
    parser.add_argument(
        "--override",
        type=_override,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace one of the checkpoint's arguments, such as bias_gelu_fusion=False",
    )


def _add_output_options(parser: argparse.ArgumentParser, verify: bool = True) -> None:
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the result; default: as stored")
    _add_overwrite(parser)
    if verify:
        parser.add_argument("--verify", action="store_true", help="compare logits afterwards, as the verify command")
        parser.add_argument("--threshold", type=float, help="largest relative error of --verify; default 1e-5")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace the folder, if a conversion made all of it")


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE")
    try:
        return name.replace("-", "_"), ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name.replace("-", "_"), value


def _shard_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 500MB or 5GB")
    return int(float(match[1]) * _SHARD_UNITS[match[2].upper()])


# Each command imports what it needs: torch and Megatron take seconds, which --help and a bad path need not cost.


def _begin(args: argparse.Namespace, source: Path) -> None:
    """Refuse a result that may not be written, and say what is read: the first within a second, before all imports."""
    from .output import require_free

    require_free(args.out, args.overwrite, [source])
    if source.exists():
        print(f"reading {source}", file=sys.stderr, flush=True)


def _checkpoint(args: argparse.Namespace, path: Path) -> Any:
    """The checkpoint in ``path``, opened as :func:`_add_checkpoint_options` allows."""
    from .commands import open_megatron

    return open_megatron(path, args.tokenizer_model, dict(args.override), args.drop_mtp)


def _refuse_checkpoint_options(args: argparse.Namespace) -> None:
    overrides = [name for name, _ in args.override]
    given = {"--tokenizer-model": args.tokenizer_model, "--drop-mtp": args.drop_mtp, "--override": overrides}
    for flag, value in given.items():
        if value:
            raise FlagError(flag, value, f"a checkpoint beside it, not a Hugging Face folder: {args.model}")


def _dtype(args: argparse.Namespace) -> Any:
    from .commands import DTYPES

    return DTYPES.get(args.dtype)


def _megatron_to_hf(args: argparse.Namespace) -> int:
    _begin(args, args.checkpoint)
    from .commands import megatron_to_hf
    from .prune import Pruned
    from .to_foreign import exported_as
    from .weight_files import read_json

    source = _checkpoint(args, args.checkpoint)
    written = Pruned(source) if args.prune else source
    carried = megatron_to_hf(
        written, args.out, _dtype(args), args.max_shard_size, args.overwrite, args.special_tokens_as_text, args.kind
    )
    said = args.kind or exported_as(written, read_json(args.out / "config.json")["model_type"])
    print(f"{args.out}: written as {said}; tokenizer: {carried}")
    return _compare(args, source, args.out) if args.verify else 0


def _hf_to_megatron(args: argparse.Namespace) -> int:
    _begin(args, args.hf)
    from .commands import hf_to_megatron, open_megatron
    from .hf_reader import HFSource

    source = HFSource(args.hf)
    hf_to_megatron(source, args.out, _dtype(args), args.overwrite)
    print(f"{args.out}: written; --load starts from it at iteration 0, without optimizer state")
    return _compare(args, open_megatron(args.out), args.hf) if args.verify else 0


def _prune(args: argparse.Namespace) -> int:
    _begin(args, args.export)
    from .prune import prune

    print(f"{args.out}: written; {prune(args.export, args.out, _dtype(args), args.max_shard_size, args.overwrite)}")
    if not args.verify:
        return 0
    from .verify import compare_exports

    gc.enable()
    return _verdict(args, args.export, args.out, compare_exports(args.export, args.out))


def _dense_to_sla(args: argparse.Namespace) -> int:
    _begin(args, args.model)
    from ...common.patterns import kinds
    from ...flags.asked import hybrid_pattern
    from ...flags.skipping import SLA_SETTINGS
    from .commands import hf_to_megatron
    from .dense_to_sla import WithSLA
    from .hf_reader import HFSource

    if is_folder := _is_hf(args.model):
        _refuse_checkpoint_options(args)
    dense = HFSource(args.model) if is_folder else _checkpoint(args, args.model)
    source = WithSLA(dense, **{name: getattr(args, name) for name in SLA_SETTINGS})
    # A hybrid model stays one.
    pattern = hybrid_pattern(dense.args or argparse.Namespace())
    flags = ("--hybrid-layer-pattern", kinds(pattern)) if pattern else ()
    hf_to_megatron(source, args.out, _dtype(args), args.overwrite, flags)
    print(f"{args.out}: written; --load with the same --sla flags starts from it at iteration 0")
    return 0


def _gpt_to_hybrid(args: argparse.Namespace) -> int:
    _begin(args, args.checkpoint)
    from .other_kind import gpt_to_hybrid

    gpt_to_hybrid(args.checkpoint, args.out, args.hybrid_layer_pattern, args.overwrite)
    print(f"{args.out}: written; --load with --hybrid-layer-pattern starts from it at iteration 0")
    return 0


def _hybrid_to_gpt(args: argparse.Namespace) -> int:
    _begin(args, args.checkpoint)
    from .other_kind import hybrid_to_gpt

    hybrid_to_gpt(args.checkpoint, args.out, args.overwrite)
    print(f"{args.out}: written; --load of a GPT starts from it at iteration 0")
    return 0


def _describe(args: argparse.Namespace) -> int:
    from .commands import describe
    from .hf_reader import HFSource

    print(describe(HFSource(args.model) if _is_hf(args.model) else _checkpoint(args, args.model)))
    return 0


def _is_hf(path: Path) -> bool:
    return (path / "config.json").exists()


def _compare(args: argparse.Namespace, source: Any, folder: Path) -> int:
    from .verify import compare

    gc.enable()
    return _verdict(args, source.path, folder, compare(source, folder))


def _verdict(args: argparse.Namespace, path: Path, folder: Path, found: Any) -> int:
    """Print how far the logits are apart; the exit status."""
    from .verify import THRESHOLD

    threshold = THRESHOLD if args.threshold is None else args.threshold
    verdict = "equal" if found.relative <= threshold else f"NOT equal (threshold {threshold:g})"
    print(
        f"{path} against {folder}: logits {verdict}; relative error {found.relative:.2e}, "
        f"largest difference {found.largest:.2e}"
    )
    return 0 if found.relative <= threshold else 1


if __name__ == "__main__":
    main()
