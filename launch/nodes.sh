# How slurm.sbatch runs a command on a node: after SETUP, and in a container, if there is one.  It sources this after it has
# set number, root, run_dir, checkpoints, setup, stage and refuse().  Sets
#   python      the interpreter, where commands run
#   container   srun's options for them (pyxis)
#   on_node     what runs a command on its node, with the node's name in the place of %NODE%
# and defines sla_job.
# shellcheck shell=bash disable=SC2154 # They are slurm.sbatch's.

# Adds FOLDER to mounts, or of one that is still to be made the folder that it will be in.
add_mount() { # FOLDER WHAT
    local folder=$1
    [ -n "$folder" ] || return 0
    until [ -e "$folder" ]; do folder=$(dirname "$folder"); done
    case $folder in
    *[,:]*) refuse "$2 $1: expected a path without a comma or colon, which part mounts" ;;
    /) refuse "$2 $1: expected a folder in one that is there, to be mounted" ;;
    esac
    case ,$mounts, in *,"$folder":"$folder",*) ;; *) mounts+=${mounts:+,}$folder:$folder ;; esac
}

# Sets mounts: CONTAINER_MOUNTS, source:target each, absolute; then what the job itself needs, in its own place.
set_mounts() {
    local given entry source target
    mounts=
    IFS=, read -r -a given <<<"${CONTAINER_MOUNTS:-}"
    for entry in "${given[@]}"; do
        source=${entry%%:*} target=${entry#"${entry%%:*}"}
        # pyxis' words for a mount without a source.
        case $source in tmpfs | umount) ;; *) source=$(realpath -ms "$source") ;; esac
        mounts+=${mounts:+,}$source${target:-:$source}
    done
    add_mount "$root" SLA_ROOT
    add_mount "$PWD" "the folder of submission"
    add_mount "$run_dir" RUN_DIR
    add_mount "$checkpoints" CHECKPOINTS
    add_mount "$stage" STAGE
    # They may be the image's as well.
    [ ! -e "$setup" ] || add_mount "$setup" SETUP
    [ ! -e "${SCRIPT:-}" ] || add_mount "$(dirname "$(realpath -ms "$SCRIPT")")" SCRIPT
}

container=() inside=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
    python=${PYTHON:-python3}
    set_mounts
    read -r -a options <<<"${CONTAINER_OPTIONS:-}"
    case ${CONTAINER_RUNTIME:-pyxis} in
    # A node that has a container of that name takes it; its first step imports the image.
    pyxis) container=(--container-image="$CONTAINER_IMAGE" --container-name="sla-megatron-$number" --container-mounts="$mounts"
        --container-workdir="$PWD" "${options[@]}") ;;
    apptainer) inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "${options[@]}" "$CONTAINER_IMAGE") ;;
    *) refuse "CONTAINER_RUNTIME $CONTAINER_RUNTIME: expected pyxis or apptainer" ;;
    esac
else
    python=${PYTHON:-$root/.venv/bin/python}
    [ -z "$setup" ] || [ -r "$setup" ] || refuse "SETUP $setup: expected a shell file"
fi

# What it sets of PYTHONPATH stays behind this repository.
# shellcheck disable=SC2016 # The node's shell expands it.
on_node=("${inside[@]}" bash -c 'root=$1 setup=$2 command=("${@:3}"); set --
    [ -z "$setup" ] || . "$setup" >&2 || {
        echo "sla-megatron: error: SETUP $setup: ended with status $? on ${SLURMD_NODENAME:-$HOSTNAME}: expected 0" >&2
        exit 2
    }
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    exec "${command[@]//%NODE%/${SLURMD_NODENAME:-}}"' bash "$root" "$setup")

# Sets job_words to a command of sla-job, and here to what runs it: a step of its own in pyxis' container.
sla_job_words() { # COMMAND [OPTION]... [-- FLAGS]
    job_words=("$python" -m sla_megatron.commands.job.cli "$1" --run "$run_dir" "${@:2}")
    here=("${on_node[@]}")
    [ ${#container[@]} -eq 0 ] ||
        here=(srun --nodes=1 --ntasks=1 --overlap --job-name="$1" "${container[@]}" "${on_node[@]}")
    if [ "${DRY_RUN:-0}" = 1 ] && [ -n "${CONTAINER_IMAGE:-}" ]; then
        job_words[0]=$(command -v "$root/.venv/bin/python" python3 | head -n 1)
        here=(env PYTHONPATH="$root")
    fi
}

sla_job() {
    sla_job_words "$@"
    "${here[@]}" "${job_words[@]}"
}
