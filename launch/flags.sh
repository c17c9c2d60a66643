# Presets of flags, for the launchers; a POSIX shell sources it after it has set root to the repository's folder.
# shellcheck shell=sh

# with_presets PRESETS COMMAND [ARG]...: runs COMMAND with the flags of PRESETS, then the ARGs.  Status 2: bad preset.
with_presets() {
    preset_lines=$(sh "${root:?}/launch/presets.sh" "$1") || return
    preset_command=$2
    shift 2
    # One argument a line: split at line ends alone, and let no * match files.
    IFS='
'
    set -f
    # shellcheck disable=SC2086
    set -- $preset_lines "$@"
    set +f
    unset IFS
    "$preset_command" "$@"
}

# flag_value FLAG DEFAULT [ARG]...: prints FLAG's value among the ARGs; of several the last counts.
flag_value() (
    flag=$1 found=$2
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
        "$flag") found=${2-} ;;
        "$flag="*) found=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$found"
)

# require_whole_replicas NODES PROCESSES FLAG...: status 2 and one line where the ranks cannot hold the flags' layout, as
# Megatron finds on each of them.  What is no number, or comes from a checkpoint, is left to it.
require_whole_replicas() (
    nodes=$1 each=$2
    shift 2
    case " $* " in *" --use-checkpoint-args "* | *" --use-mp-args-from-checkpoint-args "*) return 0 ;; esac
    tp=$(flag_value --tensor-model-parallel-size 1 "$@")
    pp=$(flag_value --pipeline-model-parallel-size 1 "$@")
    cp=$(flag_value --context-parallel-size 1 "$@")
    ep=$(flag_value --expert-model-parallel-size 1 "$@")
    etp=$(flag_value --expert-tensor-parallel-size "$tp" "$@")
    for size in "$each" "$tp" "$pp" "$cp" "$ep" "$etp"; do
        case $size in "" | 0* | *[!0-9]*) return 0 ;; esac
    done
    ranks=$((nodes * each))
    if [ $((ranks % (tp * pp * cp))) -ne 0 ]; then
        sizes="TP $tp x PP $pp x CP $cp" multiple=$((tp * pp * cp))
    elif [ $((ranks % (etp * ep * pp))) -ne 0 ]; then
        sizes="expert TP $etp x EP $ep x PP $pp" multiple=$((etp * ep * pp))
    else
        return 0
    fi
    echo "sla-megatron: error: $ranks ranks ($nodes x $each processes) cannot hold $sizes: expected a multiple of" \
        "$multiple, by other nodes, GPUs or NPROC=" >&2
    return 2
)

# print_command COMMAND [ARG]...: prints it so that a shell that reads it runs it, a line for each flag.
print_command() (
    # Of the locale's letters some are no letters to the shell that reads it.
    LC_ALL=C
    separator=
    for word in "$@"; do
        case $word in
        --*) separator=' \
    ' ;;
        esac
        printf '%s' "$separator"
        _quote "$word"
        separator=' '
    done
    echo
)

# _quote WORD: prints it as one word of a shell's.
_quote() {
    case $1 in
    "" | *[!A-Za-z0-9_./:=,@%+-]*)
        # Behind the dot, line ends at the word's end survive.
        quoted=$(printf '%s.\n' "$1" | sed "s/'/'\\\\''/g")
        printf "'%s'" "${quoted%.}"
        ;;
    *) printf '%s' "$1" ;;
    esac
}
