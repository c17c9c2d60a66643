"""``sla-eval``: lm-eval's command, which finds one more model: a Megatron checkpoint as it is.

    sla-eval --model sla_megatron --model_args pretrained=checkpoints --tasks hellaswag --batch_size 8
    torchrun --nproc-per-node 4 --no-python sla-eval --model sla_megatron \\
        --model_args pretrained=checkpoints,tensor_model_parallel_size=2 --tasks hellaswag --batch_size 8

Flags are lm-eval's: sla-eval run --help lists them.  Its other models and commands are there too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

from ...common.errors import one_line_errors
from ...common.flag_types import OneLineParser
from .arguments import OF_HFLM, EvaluationError, world_size

MODEL = "sla_megatron"
_CLASS = "sla_megatron.commands.evaluate.megatron_lm:SLAMegatronLM"

_MODEL_ARGS = f"""--model_args of {MODEL}, separated by commas:
  pretrained=PATH     what --save named, or one iter_* folder of it; load=PATH is the same; ckpt_step=N chooses one
  tensor_model_parallel_size=N, pipeline_model_parallel_size=N, expert_model_parallel_size=N
                      how the model lies over the ranks here; further ranks are copies that share the documents
  dtype=float32       or bfloat16, float16; by itself fp32 on a CPU, the checkpoint's own on a GPU
  tokenizer=PATH      a Hugging Face tokenizer in place of the checkpoint's own
  tokenizer_model=PATH  where its own is now, if it has moved
  max_length=N, max_gen_toks=N, devices=N, trust_remote_code=True, and as --model hf has them:
  {", ".join(OF_HFLM)}"""


def main() -> None:
    """Run lm-eval with ``sys.argv``.  What ``sla_megatron`` cannot do ends it: one line on stderr, exit status 2."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        _help()
        return
    if os.environ.get("RANK", "0") != "0":
        # One rank says what all do.
        os.environ["TQDM_DISABLE"] = "1"
        os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    with one_line_errors("sla-eval"):
        if importlib.util.find_spec("lm_eval") is None:
            raise EvaluationError("lm-eval is not installed: pip install lm-eval (the extra [eval] of sla-megatron)")
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging

        register()
        setup_logging()
        command = HarnessCLI()
        args = command.parse_args()
        _check(args)
        command.execute(args)


def register() -> None:
    """Let lm-eval find the model by its name; the class is imported when it is asked for."""
    # The module that fills the registry with lm-eval's own.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=_CLASS)


def _check(args: object) -> None:
    for name in ("use_cache", "cache_requests"):
        if getattr(args, name, None) and world_size() > 1:
            raise EvaluationError(f"--{name}: expected one process: ranks of one model would find other things in it")


def _help() -> None:
    OneLineParser(
        "sla-eval",
        usage="sla-eval [run | ls | validate] FLAGS",
        description=__doc__,
        epilog=_MODEL_ARGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    ).print_help()


if __name__ == "__main__":
    main()
