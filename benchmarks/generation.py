"""Decoding with the Hugging Face model: tokens a second and bytes of cache, skip-layer against dense and its peer.

    python -m benchmarks.generation --model gpt2-124m --prompts 128 1024 4096

Four models of one shape with random weights, dense, ``full``, ``pruned`` and, as a peer, transformers' own Llama or
GPT-2, generate greedily in turns in one process (so the machine's drift cancels); a round is one turn of each, in an
order that rotates.  The first rounds (``--warmup``) are left out: until each model has had each place of the order, the
heap still grows.  Decoding is timed from the first new token to the last, prefill from the call to the first token;
ratios are of the rounds' pairs.  The cache is measured after the last token, from the tensors that it holds, and must
be of the size that the definition gives: each key and value that is live, once.  If not, the command
ends with status 1.  ``--method`` shares something else than the default settings do.

With ``--compile`` the cache is of fixed size and each new token is a compiled step, as transformers does by itself on a
GPU; a compiler that has to break the model's graph ends the command.  Compiling falls into the warm-up.

``--seconds`` bounds the time of each row: after one round that is timed, no other begins that would end later.  How
many were timed is each figure's ``n``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.flag_types import count

from .heap import keep_freed_memory
from .models import METHODS, SHAPES, VARIANTS, cache_bytes, hf_config
from .peers import peer_model
from .record import Table, add_output_args, check_output, save_figure, shown, spread, write_result

#: Name -> bytes of an element.
DTYPES = {"fp32": 4, "bf16": 2}

#: Those that take turns.
MODELS = (*VARIANTS, "peer")


def main() -> None:
    """Parse the flags, measure every prompt length and batch size, write the result."""
    parser = make_parser()
    with one_line_errors():
        args = parser.parse_args()
    if args.compile and not args.warmup:
        parser.error("--warmup 0: expected 1 or more with --compile")
    check_output(parser, args)
    import torch

    on_gpu = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: expected cpu or auto, there is no GPU")
    args.device, args.dtype = "cuda" if on_gpu else "cpu", args.dtype or ("bf16" if on_gpu else "fp32")
    rows = measure(args)
    write_result(args, "generation", torch.cuda.get_device_name() if on_gpu else "cpu", rows, tables, plot)
    wrong = [row for row in rows for each in row["variants"].values() if each["cache_bytes"] != each["formula_bytes"]]
    if wrong:
        sys.exit(f"benchmarks.generation: error: the cache is not of the formula's size: {wrong[0]}")


def make_parser() -> argparse.ArgumentParser:
    """Of the command."""
    parser = add_output_args(
        argparse.ArgumentParser(
            prog="benchmarks.generation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ),
        "generation",
    )
    parser.add_argument("--model", choices=list(SHAPES), default="gpt2-124m", help="the shape (default: gpt2-124m)")
    parser.add_argument("--method", choices=METHODS, default="sla", help="what is shared (default: sla)")
    parser.add_argument("--prompts", type=count("--prompts"), nargs="+", default=[128, 1024, 4096], metavar="TOKENS")
    parser.add_argument("--batches", type=count("--batches"), nargs="+", default=[1], metavar="B")
    parser.add_argument("--tokens", type=count("--tokens", 2), default=33, help="new tokens (default: 33)")
    parser.add_argument("--rounds", type=count("--rounds"), default=9, help="that are timed (default: 9)")
    parser.add_argument("--warmup", type=count("--warmup", 0), default=3, help="rounds left out (default: 3)")
    parser.add_argument(
        "--seconds", type=count("--seconds"), metavar="S", help="of each row at most; default: as needed"
    )
    parser.add_argument("--compile", action="store_true", help="a static cache and compiled decoding steps")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 without one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is")
    return parser


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each prompt length and batch size."""
    import torch
    import transformers

    keep_freed_memory()
    # Collected between the turns: what a compiler leaves takes most of a second to look through, whenever it is done.
    gc.disable()
    transformers.logging.set_verbosity_error()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    rows = []
    for length in args.prompts:
        for batch in args.batches:
            started = time.perf_counter()
            # New models for each: one keeps its static cache, and its compiled steps, at the longest prompt's size.
            torch.compiler.reset()
            torch.manual_seed(1)
            positions = length + args.tokens
            models = {variant: build(args, variant, positions, dtype) for variant in MODELS}
            vocabulary = SHAPES[args.model]["vocab_size"]
            prompt = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))
            rows.append(measure_one(models, prompt.to(args.device), args, started))
            print(f"prompt {length}, batch {batch}: {ratio_line(rows[-1])}", flush=True)
    return rows


def build(args: argparse.Namespace, variant: str, positions: int, dtype: Any) -> Any:
    """A model with random weights, in evaluation mode."""
    from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

    if variant == "peer":
        model = peer_model(args.model, positions)
    else:
        model = SlaGPTForCausalLM(hf_config(args.model, variant, positions, args.method))
    return model.to(dtype).to(args.device).eval()


class Clock:
    """A streamer of transformers: notes when each token is on the host, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def rounds(args: argparse.Namespace, started: float) -> Iterator[tuple[int, bool]]:
    """The number of each round, from 0, and whether it is timed: those of the warm-up are not.

    Where another round would take more than is left of ``--seconds`` since ``started``, none follows, or if none was
    timed yet, one that is.
    """
    took, timed = 0.0, 0
    for number in range(args.warmup + args.rounds):
        began = time.perf_counter()
        is_late = number > 0 and args.seconds is not None and began + took > started + args.seconds
        if is_late and timed:
            return
        is_timed = is_late or number >= args.warmup
        yield number, is_timed
        took, timed = time.perf_counter() - began, timed + is_timed


def measure_one(models: dict[str, Any], prompt: Any, args: argparse.Namespace, started: float) -> dict[str, Any]:
    """All rounds of one prompt, ``[batch, length]``.  ``started``: when the row's time began."""
    batch, length = prompt.shape
    prefill: dict[str, list[float]] = {variant: [] for variant in models}
    decode: dict[str, list[float]] = {variant: [] for variant in models}
    cache: dict[str, int] = {}
    how = static_and_compiled() if args.compile else {}
    for turn, is_timed in rounds(args, started):
        first = turn % len(models)
        for variant in (*list(models)[first:], *list(models)[:first]):
            gc.collect()
            seconds, cache[variant] = generate(models[variant], prompt, args.tokens, how)
            if is_timed:
                prefill[variant].append(seconds[0])
                decode[variant].append(seconds[1])
    rate = batch * (args.tokens - 1)
    # The peer caches what the dense model does.
    configs = {variant: models["dense" if variant == "peer" else variant].config for variant in models}
    return {
        "model": args.model,
        "method": args.method,
        "peer": type(models["peer"]).__name__,
        "prompt": length,
        "batch": batch,
        "new_tokens": args.tokens,
        "dtype": args.dtype,
        "compiled": args.compile,
        "variants": {
            variant: {
                "decode_tokens_per_second": spread([rate / seconds for seconds in decode[variant]]),
                "prefill_seconds": spread(prefill[variant]),
                "cache_bytes": cache[variant],
                # Of the last token nothing is cached: it is never run.
                "formula_bytes": cache_bytes(configs[variant], batch, length + args.tokens - 1, DTYPES[args.dtype]),
            }
            for variant in models
        },
        "decode_ratio": {v: spread(_ratios(decode["dense"], decode[v])) for v in VARIANTS[1:]},
        "prefill_ratio": {v: spread(_ratios(prefill["dense"], prefill[v])) for v in VARIANTS[1:]},
        "cache_ratio": {v: cache[v] / cache["dense"] for v in VARIANTS[1:]},
        "decode_over_peer": {v: spread(_ratios(decode["peer"], decode[v])) for v in VARIANTS},
        "prefill_over_peer": {v: spread(_ratios(prefill["peer"], prefill[v])) for v in VARIANTS},
    }


def _ratios(dense: list[float], other: list[float]) -> list[float]:
    """Speed of the other, dense (or the peer) = 1, round by round, from their seconds."""
    return [a / b for a, b in zip(dense, other, strict=True)]


def static_and_compiled() -> dict[str, Any]:
    """Arguments of ``generate``: a cache of fixed size, and ``torch.compile`` of a step in one graph."""
    from transformers import CompileConfig

    # Of several models in one process, all after the first would else be compiled for shapes that vary.
    config = CompileConfig(fullgraph=True, dynamic=False)
    # On a GPU transformers compiles in any case; elsewhere only when asked by this.
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def generate(model: Any, prompt: Any, new_tokens: int, how: dict[str, Any]) -> tuple[tuple[float, float], int]:
    """Greedy generation: seconds of prefill and of decoding, and the bytes that the cache holds at the end.

    Args:
        how: more arguments of the model's ``generate``.
    """
    import torch

    clock, start = Clock(), time.perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        streamer=clock,
        **how,
    )
    # The prompt's time, then one each token.
    if len(clock.times) != 1 + new_tokens:
        raise RuntimeError(f"{len(clock.times) - 1} tokens were generated, not {new_tokens}")
    seconds = (clock.times[1] - start, clock.times[-1] - clock.times[1])
    tensors = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values) if t is not None]
    # Storages, not views: what memory is held.
    return seconds, sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def ratio_line(row: dict[str, Any]) -> str:
    """For the progress."""
    parts = [f"dense {row['decode_over_peer']['dense']['median']:.3f} of {row['peer']}'s speed"]
    for variant in VARIANTS[1:]:
        speed, cache = row["decode_ratio"][variant]["median"], row["cache_ratio"][variant]
        parts.append(f"{variant} {speed:.3f} of dense's speed, {cache:.4f} of its cache")
    return "; ".join(parts)


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each prompt, batch and model."""
    first = result["rows"][0]
    # Earlier results have no peer.
    has_peer = "peer" in first
    rows = []
    for row in result["rows"]:
        dense_bytes = row["variants"]["dense"]["cache_bytes"]
        for variant, figures in row["variants"].items():
            cells = [
                row["peer"] if variant == "peer" else variant,
                str(row["prompt"]),
                str(row["batch"]),
                str(figures["decode_tokens_per_second"]["n"]),
                shown(figures["decode_tokens_per_second"], 2),
                _against(row["decode_ratio"], variant, "dense"),
                shown(figures["prefill_seconds"]),
                _against(row["prefill_ratio"], variant, "dense"),
                f"{figures['cache_bytes'] / 1e6:.3f}",
                "1" if variant == "dense" else f"{figures['cache_bytes'] / dense_bytes:.4f}",
                "equal" if figures["cache_bytes"] == figures["formula_bytes"] else str(figures["formula_bytes"]),
            ]
            if has_peer:
                cells.insert(6, _against(row["decode_over_peer"], variant, "peer"))
            rows.append(tuple(cells))
    decode = ("decode, tokens/s", "/ dense", "/ peer") if has_peer else ("decode, tokens/s", "/ dense")
    note = "Median (least-most). Ratios above 1 are faster than dense, and are medians over pairs of one round."
    if has_peer:
        note += " The peer is transformers' own model of the same shape."
    return [
        Table(
            f"Generation: {first['model']}, {_method(first)}{first['dtype']}, {first['new_tokens']} new tokens, "
            f"{'compiled, ' if first.get('compiled') else ''}{result['machine']['device']}",
            (
                "model",
                "prompt",
                "batch",
                "runs",
                *decode,
                "prefill, s",
                "speed / dense",
                "cache, MB",
                "/ dense",
                "formula",
            ),
            rows,
            note=note,
        )
    ]


def _method(row: dict[str, Any]) -> str:
    """Of the title; earlier results have none."""
    method = row.get("method", "sla")
    return "" if method == "sla" else f"{method}, "


def _against(ratios: dict[str, dict[str, float]], variant: str, base: str) -> str:
    """A cell: the ratio of ``variant``, where there is one."""
    if variant == base:
        return "1"
    return shown(ratios[variant]) if variant in ratios else ""


def plot(result: dict[str, Any], path: Path) -> None:
    """Decoding speed and cache against dense, over the prompt's length."""
    from matplotlib import pyplot

    rows = result["rows"]
    figure, (speed, cache) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    batches = sorted({row["batch"] for row in rows})
    for variant, colour in zip(VARIANTS[1:], ("tab:blue", "tab:green"), strict=True):
        for batch, style in zip(batches, ("-", "--", ":", "-.") * len(batches), strict=False):
            chosen = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["prompt"])
            prompts = [row["prompt"] for row in chosen]
            ratios = [row["decode_ratio"][variant] for row in chosen]
            middle = [ratio["median"] for ratio in ratios]
            spans = [[r["median"] - r["min"] for r in ratios], [r["max"] - r["median"] for r in ratios]]
            label = f"{variant}, batch {batch}"
            speed.errorbar(prompts, middle, yerr=spans, fmt=f"o{style}", capsize=3, color=colour, label=label)
            cache.plot(prompts, [row["cache_ratio"][variant] for row in chosen], f"o{style}", color=colour, label=label)
    for axes, title in ((speed, "decode speed / dense"), (cache, "cache bytes / dense")):
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens in the prompt")
        axes.set_title(title, loc="left")
    cache.set_ylim(0, 1.05)
    speed.legend(fontsize="small")
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
