"""Decoding with the Hugging Face model: tokens a second and bytes of cache, skip-layer against dense.

    python -m benchmarks.generation --model gpt2-124m --prompts 128 1024 4096

Three models of one shape with random weights, dense, ``full`` and ``pruned``, generate greedily in turns in one process
(so the machine's drift cancels); a round is one turn of each, in an order that rotates.  The first rounds
(``--warmup``) are left out: until each model has had each place of the order, the heap still grows.  Decoding is timed
from the first new token to the last, prefill from the call to the first token; ratios are of the rounds' pairs.  The
cache is measured after the last token, from the tensors that it holds, and must be of the size that the definition
gives: each live (layer, group) once.  If not, the command ends with status 1.

With ``--compile`` the cache is of fixed size and each new token is a compiled step, as transformers does by itself on a
GPU; a compiler that has to break the model's graph ends the command.  Compiling falls into the warm-up.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.flag_types import count

from .heap import keep_freed_memory
from .models import SHAPES, VARIANTS, hf_config
from .record import Table, add_output_args, check_output, save_figure, shown, spread, write_result

DTYPES = ("fp32", "bf16")


def main() -> None:
    """Parse the flags, measure every prompt length and batch size, write the result."""
    parser = add_output_args(
        argparse.ArgumentParser(
            prog="benchmarks.generation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ),
        "generation",
    )
    parser.add_argument("--model", choices=list(SHAPES), default="gpt2-124m", help="the shape (default: gpt2-124m)")
    parser.add_argument("--prompts", type=count("--prompts"), nargs="+", default=[128, 1024, 4096], metavar="TOKENS")
    parser.add_argument("--batches", type=count("--batches"), nargs="+", default=[1], metavar="B")
    parser.add_argument("--tokens", type=count("--tokens", 2), default=33, help="new tokens (default: 33)")
    parser.add_argument("--rounds", type=count("--rounds"), default=9, help="that are timed (default: 9)")
    parser.add_argument("--warmup", type=count("--warmup", 0), default=3, help="rounds left out (default: 3)")
    parser.add_argument("--compile", action="store_true", help="a static cache and compiled decoding steps")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 without one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is")
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
            # New models for each: one keeps its static cache, and its compiled steps, at the longest prompt's size.
            torch.compiler.reset()
            torch.manual_seed(1)
            positions = length + args.tokens
            models = {variant: build(args.model, variant, positions, dtype, args.device) for variant in VARIANTS}
            vocabulary = SHAPES[args.model]["vocab_size"]
            prompt = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))
            rows.append(measure_one(models, prompt.to(args.device), args))
            print(f"prompt {length}, batch {batch}: {ratio_line(rows[-1])}", flush=True)
    return rows


def build(name: str, variant: str, positions: int, dtype: Any, device: str) -> Any:
    """A model with random weights, in evaluation mode."""
    from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

    return SlaGPTForCausalLM(hf_config(name, variant, positions)).to(dtype).to(device).eval()


class Clock:
    """A streamer of transformers: notes when each token is on the host, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure_one(models: dict[str, Any], prompt: Any, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one prompt, ``[batch, length]``."""
    batch, length = prompt.shape
    prefill: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    decode: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    cache: dict[str, int] = {}
    how = static_and_compiled() if args.compile else {}
    for turn in range(args.warmup + args.rounds):
        first = turn % len(VARIANTS)
        for variant in (*VARIANTS[first:], *VARIANTS[:first]):
            gc.collect()
            seconds, cache[variant] = generate(models[variant], prompt, args.tokens, how)
            if turn >= args.warmup:
                prefill[variant].append(seconds[0])
                decode[variant].append(seconds[1])
    rate = batch * (args.tokens - 1)
    return {
        "model": args.model,
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
                "formula_bytes": formula_bytes(models[variant].config, batch, length + args.tokens - 1, args.dtype),
            }
            for variant in VARIANTS
        },
        "decode_ratio": {v: spread(_ratios(decode["dense"], decode[v])) for v in VARIANTS[1:]},
        "prefill_ratio": {v: spread(_ratios(prefill["dense"], prefill[v])) for v in VARIANTS[1:]},
        "cache_ratio": {v: cache[v] / cache["dense"] for v in VARIANTS[1:]},
    }


def _ratios(dense: list[float], other: list[float]) -> list[float]:
    """Speed of the other, dense = 1, round by round, from their seconds."""
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


def formula_bytes(config: Any, batch: int, positions: int, dtype: str) -> int:
    """By the definition: keys and values of each (layer, group) that some layer reads, once."""
    layers, groups = range(1, config.num_hidden_layers + 1), range(config.num_key_value_heads)
    distances, skipping = config.sla_skip_distances, config.sla_skip_groups
    distance = {g: distances[j % len(distances)] for j, g in enumerate(skipping)} if distances else {}
    live = {
        (layer - distance[g] if g in distance and layer > distance[g] else layer, g) for layer in layers for g in groups
    }
    return 2 * len(live) * batch * positions * config.head_dim * {"fp32": 4, "bf16": 2}[dtype]


def ratio_line(row: dict[str, Any]) -> str:
    """For the progress."""
    parts = []
    for variant in VARIANTS[1:]:
        speed, cache = row["decode_ratio"][variant]["median"], row["cache_ratio"][variant]
        parts.append(f"{variant} {speed:.3f} of dense's speed, {cache:.4f} of its cache")
    return "; ".join(parts)


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each prompt, batch and model."""
    rows = []
    for row in result["rows"]:
        for variant, figures in row["variants"].items():
            is_dense = variant == "dense"
            rows.append(
                (
                    variant,
                    str(row["prompt"]),
                    str(row["batch"]),
                    str(figures["decode_tokens_per_second"]["n"]),
                    shown(figures["decode_tokens_per_second"], 2),
                    "1" if is_dense else shown(row["decode_ratio"][variant]),
                    shown(figures["prefill_seconds"]),
                    "1" if is_dense else shown(row["prefill_ratio"][variant]),
                    f"{figures['cache_bytes'] / 1e6:.3f}",
                    "1" if is_dense else f"{row['cache_ratio'][variant]:.4f}",
                    "equal" if figures["cache_bytes"] == figures["formula_bytes"] else str(figures["formula_bytes"]),
                )
            )
    first = result["rows"][0]
    header = ("model", "prompt", "batch", "runs", "decode, tokens/s", "/ dense", "prefill, s", "speed / dense")
    return [
        Table(
            f"Generation: {first['model']}, {first['dtype']}, {first['new_tokens']} new tokens, "
            f"{'compiled, ' if first.get('compiled') else ''}{result['machine']['device']}",
            (*header, "cache, MB", "/ dense", "formula"),
            rows,
            note="Median (least-most). Ratios above 1 are faster than dense, and are medians over pairs of one round.",
        )
    ]


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
