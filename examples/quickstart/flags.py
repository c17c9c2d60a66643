"""The Megatron flags of the quickstart: one small GPT and how it is trained.

Nothing here is about the machine: sla_megatron.pretrain_gpt adds what training without a GPU needs.
"""

from __future__ import annotations

from pathlib import Path

from examples.quickstart.build_dataset import Dataset

LAYERS = 8
# Each head has its own K/V group. With 8, the groups that do not skip (every fourth) are shared out evenly
# between two ranks, which --sla-kv-projection pruned needs.
HEADS = 8
SEQ_LENGTH = 128
GLOBAL_BATCH = 16
TOKENS_PER_ITERATION = SEQ_LENGTH * GLOBAL_BATCH
EVAL_INTERVAL = SAVE_INTERVAL = 50

# Megatron's own layers: its default ones are Transformer Engine's, which not every machine with a GPU has.
MODEL = f"""
    --transformer-impl local
    --num-layers {LAYERS} --hidden-size 128 --ffn-hidden-size 512
    --num-attention-heads {HEADS}
    --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} --position-embedding-type rope
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.05
"""
# The last flag lets a run be continued with more iterations: its learning-rate schedule is then another than
# its checkpoint's, which Megatron would otherwise take for a mistake.
TRAINING = f"""
    --micro-batch-size 8 --global-batch-size {GLOBAL_BATCH} --seed 1234
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05
    --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --eval-interval {EVAL_INTERVAL} --save-interval {SAVE_INTERVAL} --ckpt-format torch_dist
    --override-opt_param-scheduler
"""


def training_flags(dataset: Dataset, run_dir: Path, cache_dir: Path, train_iters: int, eval_iters: int) -> list[str]:
    """Flags of one run on `dataset`, which saves to and resumes from `run_dir`/checkpoints.

    Megatron's index of shuffled samples goes to `cache_dir`, which both runs share: same data, same order.
    """
    checkpoints = str(run_dir / "checkpoints")
    data = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(dataset.tokenizer_model)]
    data += ["--data-path", str(dataset.prefix), "--split", "95,5,0", "--data-cache-path", str(cache_dir)]
    length = ["--train-iters", str(train_iters), "--eval-iters", str(eval_iters)]
    length += ["--log-interval", str(max(1, train_iters // 40))]
    output = ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir", str(run_dir / "tensorboard")]
    return [*MODEL.split(), *TRAINING.split(), *data, *length, *output]
