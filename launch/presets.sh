#!/bin/sh
# Prints the arguments of presets, one a line; the launchers and sla-sweep ask it, and nothing else reads presets:
#
#   launch/presets.sh "gpt2-124m 4k sla"
#
# That means the lines of gpt2-124m.flags, 4k.flags and sla.flags in launch/presets, in order: of
# a flag that comes twice the later one counts.  A name with a slash, or one that ends in .flags, is a file's path.
#
# A line of such a file is one of
#   --flag value value    a flag with its values, parted by spaces; a word that begins with # ends the line
#   --flag=some value     one argument as it stands, for a value with spaces
#   @name                 the lines of another preset
#   # comment
# Nothing in it is expanded or run.
# Exit: 0, or 2 and one line on stderr for a preset that there is not, or that is none.
set -u

root=$(cd "$(dirname "$0")/.." && pwd)

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

set -f
unset IFS
for name in ${1-}; do
    _flags_of "$name" 8 || exit
done
