"""What vLLM generates by transformers' own model, as JSON: ``python -m tests.serving.without_plugin FOLDER..``.

A process of its own, as plugins are loaded once in each, and vLLM changes the model's class, which the test runs too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

LENGTHS = (1, 31, 66)


def main() -> None:
    os.environ["VLLM_PLUGINS"] = ""
    from .engine import answers, cache_bytes_per_token, engine, prompts

    for folder in sys.argv[1:]:
        with engine(Path(folder), model_impl="transformers", trust_remote_code=True, max_num_batched_tokens=32) as llm:
            print(json.dumps([answers(llm, prompts(*LENGTHS)), cache_bytes_per_token(llm)]), flush=True)


if __name__ == "__main__":
    main()
