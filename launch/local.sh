#!/bin/sh
# Pretrain on one machine, one process a GPU (or NPROC processes on the CPU):
#
#   launch/pretrain.sh --sla --tensor-model-parallel-size 2 --num-layers 12 ...
#
# Named overrides: PYTHON= (default: .venv's), NPROC= (default: the number of GPUs, or 2 without one).
# All arguments go to sla_megatron.pretrain_gpt as they are.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
nproc=${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
# Megatron insists on it for tensor parallelism on most GPUs.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc" -m sla_megatron.pretrain_gpt "$@"
