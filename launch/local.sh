#!/bin/sh
# Pretrain on one machine, one process a GPU (or NPROC processes on the CPU):
#
#   PRESETS="gpt2-124m 4k sla" launch/local.sh --train-iters 100000 --data-path data/corpus ...
#   launch/local.sh --sla --tensor-model-parallel-size 2 --num-layers 12 ...
#
# Named overrides:
#   PRESETS=  flag files of launch/presets, or paths of your own, in order (default: none); see launch/README.md
#   SCRIPT=, MODULE=   a training script, or module, of your own in place of sla_megatron.pretrain_gpt
#   NPROC=    processes (default: the number of GPUs, or 2 without one)
#   PYTHON=   the interpreter (default: .venv's)
#   DRY_RUN=1 prints the command, to be read or pasted, and runs nothing
# The presets' flags, then all arguments as they are, go to the training.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/flags.sh
. "$root/launch/flags.sh"

run() {
    if [ -n "${SCRIPT:-}" ] && { [ -n "${MODULE:-}" ] || [ ! -f "$SCRIPT" ]; }; then
        echo "local.sh: error: SCRIPT $SCRIPT${MODULE:+, MODULE $MODULE}: expected a file, or a module instead" >&2
        exit 2
    fi
    python=${PYTHON:-$root/.venv/bin/python}
    nproc=${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
    if [ -z "${NPROC:-}" ] && [ "$nproc" = 0 ]; then
        nproc=2
        [ "$(flag_value --device auto "$@")" = cpu ] ||
            echo "local.sh: no GPU here: $nproc processes on the CPU; NPROC= starts another number" >&2
    fi
    require_whole_replicas 1 "$nproc" "$@"
    module=${MODULE:-sla_megatron.pretrain_gpt}
    [ -z "${SCRIPT:-}" ] || module=
    # Megatron insists on one connection for tensor parallelism on most GPUs.
    set -- env "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}" \
        "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}" \
        "$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc" ${SCRIPT:+"$SCRIPT"} \
        ${module:+-m "$module"} "$@"
    if [ "${DRY_RUN:-0}" = 1 ]; then
        print_command "$@"
    else
        exec "$@"
    fi
}

with_presets "${PRESETS:-}" run "$@"
