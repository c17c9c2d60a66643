# Presets of flags, for the launchers; a POSIX shell sources it after it has set root to the repository's folder.
# shellcheck shell=sh
#
# PRESETS="gpt2-124m 4k sla" means the lines of gpt2-124m.flags, 4k.flags and sla.flags in launch/presets, in order: of
# a flag that comes twice the later one counts.  A name with a slash, or one that ends in .flags, is a file's path.
#
# A line of such a file is one of
#   --flag value value    a flag with its values, parted by spaces; a word that begins with # ends the line
#   --flag=some value     one argument as it stands, for a value with spaces
#   @name                 the lines of another preset
#   # comment
# Nothing in it is expanded or run.

# with_presets PRESETS COMMAND [ARG]...: runs COMMAND with the flags of PRESETS, then the ARGs.  Status 2: bad preset.
with_presets() {
    preset_lines=$(preset_flags "$1") || return
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

# preset_flags PRESETS: prints their arguments, one a line.
preset_flags() (
    set -f
    unset IFS
    for name in $1; do
        _flags_of "$name" 8 || exit
    done
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

# _flags_of NAME DEPTH: the arguments of one preset, which may name others, DEPTH files deep.
_flags_of() (
    file=$(_preset_file "$1" "$2") || exit
    number=0
    while read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        case $line in
        "" | "#"*) ;;
        @*) _flags_of "${line#@}" $(($2 - 1)) || exit ;;
        --*) _arguments "$line" ;;
        *) _bad_preset "$file:$number: expected --flag, @preset or # comment, not $line" || exit ;;
        esac
    done <"$file"
)

_arguments() {
    case ${1%%[[:space:]]*} in
    *=*)
        printf '%s\n' "$1"
        return
        ;;
    esac
    for word in $1; do
        case $word in
        "#"*) break ;;
        *) printf '%s\n' "$word" ;;
        esac
    done
}

# _preset_file NAME DEPTH: where the preset is.
_preset_file() {
    case $1 in
    */* | *.flags) preset=$1 ;;
    *) preset=${root:?}/launch/presets/$1.flags ;;
    esac
    if [ "$2" -eq 0 ]; then
        _bad_preset "preset $1 names itself, or presets that name presets too deep"
    elif [ -f "$preset" ] && [ -r "$preset" ]; then
        printf '%s\n' "$preset"
    elif [ "$preset" = "$1" ]; then
        _bad_preset "no preset $1: there is no such file"
    else
        _bad_preset "no preset $1; there are $(_preset_names)(or a file: ./mine.flags)"
    fi
}

_preset_names() {
    set +f
    for preset in "$root"/launch/presets/*.flags; do
        preset=${preset##*/}
        printf '%s ' "${preset%.flags}"
    done
}

_bad_preset() {
    echo "sla-megatron: error: PRESETS: $1" >&2
    return 2
}

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
