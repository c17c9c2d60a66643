"""The quickstart's last step: the SLA checkpoint as a Hugging Face model, compared, and asked for a few tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from examples.quickstart.launch import TrainingFailed
from examples.quickstart.progress import Progress

#: Of each text of the data set, a beginning.
PROMPTS = {"code": "def __init__(self", "prose": "This function returns"}

NEW_TOKENS = 24


def export(checkpoints: Path, folder: Path, text: str) -> str:
    """Convert, verify, generate in the manner of `text`; the lines for the quickstart's report.

    Raises:
        TrainingFailed: if the export computes something else than Megatron, or cannot be used.
    """
    print(f"\nexport: {checkpoints} to {folder}", flush=True)
    command = [
        sys.executable,
        "-m",
        "sla_megatron.commands.convert.cli",
        "megatron-to-hf",
        str(checkpoints),
        str(folder),
    ]
    # The folder is the quickstart's own: an earlier launch's export of fewer iterations.
    with Progress("export", "converting, and comparing with Megatron's own logits"):
        run = subprocess.run([*command, "--overwrite", "--verify"], capture_output=True, text=True)
    if run.returncode == 2:
        # Flags after -- can ask for what the format cannot say; the comparison stands without the export.
        return f"Not exported to Hugging Face: {run.stderr.strip().splitlines()[-1]}"
    if run.returncode:
        raise TrainingFailed(f"quickstart: the export failed:\n{run.stdout}{run.stderr}")
    verdict = run.stdout.strip().splitlines()[-1].split(": ", 1)[1]
    print(f"export: {verdict}", flush=True)
    prompt = PROMPTS[text]
    with Progress("export", "loading it with transformers, to write a few tokens"):
        written = generate(folder, prompt)
    return f"As a Hugging Face model: {folder}, {verdict}\n  {prompt!r} goes on, greedily, with {written!r}"


def generate(folder: Path, prompt: str) -> str:
    """What the exported model writes after `prompt`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
