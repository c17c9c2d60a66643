#!/bin/sh
# Prints the path of a Python that can make this project's environment.
#
#   launch/find-python.sh                      the first that fits on PATH, then among pyenv's versions
#   PYTHON=/opt/py/bin/python launch/find-python.sh    that one or nothing
#
# "Fits" means 3.12 or newer with the venv and ensurepip modules (Debian packages them apart).
# 3.12 is tried first: it is the version the pinned dependencies were tested with.
# Exit: 0 and one path on stdout, or 1 and one line on stderr.
set -u

# Prints sys.executable of the interpreter $1 if it fits. Asking the interpreter itself sees through
# pyenv's shims, which exist for every version but run only the selected one.
fits() {
    path=$("$1" -c '
import sys
if sys.version_info < (3, 12):
    sys.exit(1)
import ensurepip, venv
print(sys.executable)' 2>/dev/null) && [ -n "$path" ] && echo "$path"
}

# Prints why the interpreter $1 does not fit, for the one line that refuses PYTHON=.
why_not() {
    found=$("$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || found=
    case $found in
    "") echo "it is not a Python interpreter that runs" ;;
    [12].* | 3.[0-9].* | 3.1[01].*) echo "it is Python $found" ;;
    *) echo "it is Python $found without a working venv module (on Debian: apt-get install python3-venv)" ;;
    esac
}

if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" && exit 0
    echo "find-python: PYTHON=$PYTHON cannot be used: $(why_not "$PYTHON"); need Python 3.12 or newer with venv" >&2
    exit 1
fi

for name in python3.12 python3.13 python3.14 python3 python; do
    command -v "$name" >/dev/null 2>&1 && fits "$name" && exit 0
done

# pyenv's root: its own word, the variable its installer sets, then its default place.
root=$(pyenv root 2>/dev/null) || root=${PYENV_ROOT:-${HOME:-}/.pyenv}
for minor in 12 13 14; do
    for python in "$root/versions/3.$minor"*/bin/python; do
        [ -x "$python" ] && fits "$python" && exit 0
    done
done

echo "find-python: no Python 3.12 or newer with venv found on PATH (python3.12, python3.13, python3.14, python3," \
    "python) or in $root/versions; install one, or name it: make PYTHON=/path/to/python3.12" >&2
exit 1
