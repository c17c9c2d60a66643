#!/bin/sh
# Makes or updates the project's environment:  launch/make-venv.sh [DIR]   (DIR defaults to .venv)
#
# Named overrides: PYTHON= (see find-python.sh). An environment that is already there is updated in place.
# DIR/.installed is touched at the very end, so an interrupted installation is taken up again by make.
set -eu

here=$(dirname "$0")
venv=${1:-$here/../.venv}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$("$here/find-python.sh")
    echo "making $venv with $python"
    "$python" -m venv "$venv"
fi
echo "installing torch, megatron-core and the other pinned dependencies into $venv"
echo "(about 3 minutes and 6 GB the first time, seconds after that)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$here/../constraints.txt" --editable "$here/..[dev]"
touch "$venv/.installed"
echo "installed: $("$venv/bin/python" -c 'import importlib.metadata as m
print(", ".join(f"{name} {m.version(name)}" for name in ("torch", "megatron-core")))')"
