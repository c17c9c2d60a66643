# What slurm.sbatch asks and tells Slurm; it sources this after it has set job, checkpoints and say().
# shellcheck shell=bash disable=SC2154,SC2034 # They are slurm.sbatch's.

# Where ranks meet: an address of the first node.
meeting_point() {
    local head
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Node names need not resolve; Slurm knows the address.
    scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

# Two jobs that save to one folder would overwrite each other's checkpoints.
claim_checkpoints() {
    local owner=$checkpoints/.in-use-by other
    exec 9>>"$owner" || return 2
    # Where the file system has locks: two tasks of an array begin in the same moment.
    flock 9 2>/dev/null
    other=$(tail -n 1 "$owner")
    if [ -n "$other" ] && [ "$other" != "$job" ] &&
        squeue --noheader --states=RUNNING,SUSPENDED --jobs="$other" 2>/dev/null | grep -q .; then
        say "error: $checkpoints: job $other is training there: expected another RUN_DIR, or CHECKPOINTS, or its end" >&2
        return 2
    fi
    echo "$job" >"$owner"
    exec 9>&-
}

# The nodes where SETUP or HEALTH_CHECK fails, with commas between them.
unhealthy_nodes() {
    local check=("$python" -m sla_megatron.commands.job.cli health --run "$run_dir" --gpus "${SLURM_GPUS_ON_NODE:-0}")
    [ -z "${HEALTH_CHECK:-}" ] || check=(bash -c "$HEALTH_CHECK")
    # shellcheck disable=SC2016 # The node's shell expands it.
    srun --job-name=health --kill-on-bad-exit=0 --wait=0 "${container[@]}" \
        bash -c '"$@" >&2 || echo "unhealthy=$SLURMD_NODENAME"' bash "${on_node[@]}" "${check[@]}" |
        sed -n 's/^unhealthy=//p' | paste -s -d,
}

# Slurm lets the excluded nodes of waiting jobs alone be changed: hold, change, release.
requeue_without() { # NODES
    local nodes count
    nodes=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    [ "$nodes" = "(null)" ] && nodes=$1 || nodes=$nodes,$1
    # A check that fails everywhere says nothing of a node.
    count=$(scontrol show hostnames "$nodes" | wc -l)
    if [ "$count" -gt "${MAX_EXCLUDED:-4}" ]; then
        say "error: $1 would be excluded too, which makes $count nodes: expected at most ${MAX_EXCLUDED:-4}" >&2
        exit 1
    fi
    say "excluding $1, and going on elsewhere"
    trap '' TERM
    scontrol requeuehold "$job" || exit
    for _ in $(seq 50); do
        scontrol update JobId="$job" ExcNodeList="$nodes" && break
        sleep 0.2
    done
    scontrol release "$job"
    exit 0
}

# It finishes what it is at, for a few seconds.  A file system that hangs holds it, but not the chain.
end_attending() { # PID
    kill "$1" 2>/dev/null
    for _ in $(seq 150); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    say "sla-job attend has not ended after 15 s, and is left"
}

# Tells the ranks, or torchrun, which tells them.  Slurm's own signal reaches all processes of a step: W&B's service would
# end, and without it the rank that speaks to it, in the place of a save.
forward() { # WHAT [SIGNAL]
    signalled=(--signalled)
    local id signal=${2:-TERM} does="save and exit"
    [ "$signal" = TERM ] || does=end
    id=$(squeue --noheader --steps --jobs="$job" --format='%i %j' | sed -n 's/ train$//p')
    say "$1 came: the ranks $does${id:+ (step $id)}"
    [ -n "$id" ] || return 0
    if [ "$signal" != TERM ] || ! tell_tasks "$number.${id##*.}"; then
        scancel --signal="$signal" "$id"
    fi
}

# Sends TERM to the tasks of a step alone; not 0 where it cannot, as where steps cannot share a node.
tell_tasks() { # STEP
    # shellcheck disable=SC2016 # The node's shell expands it.
    timeout 20 srun --overlap --ntasks="$nnodes" --ntasks-per-node=1 --job-name=signal bash -c '
        pids=$(scontrol listpids "$1" "$SLURMD_NODENAME" | while read -r pid _ _ task _; do
            case $task in [0-9]*) echo "$pid" ;; esac
        done)
        [ -n "$pids" ] && kill $pids' bash "$1" </dev/null
}

# Ends this script, and has Slurm start the job again where it is still to run.
requeue() {
    # A job that its user cancels, whose time is up, or that Slurm itself requeues is not running any more.
    local state
    state=$(squeue --noheader --jobs="$job" --format=%T)
    if [ "$state" = RUNNING ]; then
        say "requeueing job $job"
        # Slurm ends this script; were TERM ignored, the nodes would wait for KillWait first.
        trap - TERM
        scontrol requeue "$job" && sleep 60
    fi
    say "job $job is ${state:-not known}, and left to Slurm; if it ends, it is submitted again to go on from its newest checkpoint"
}
