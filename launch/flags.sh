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
