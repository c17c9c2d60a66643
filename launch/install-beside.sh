#!/bin/sh
# Installs this project into an environment that has a torch of its own, which stays:  launch/install-beside.sh
#
# For a container's image, or a cluster's module, whose torch, Transformer Engine, Apex and Triton are built for its GPUs.
# What is missing of the other packages is installed at the versions of constraints.txt, one by one, without what they
# ask for (pip --no-deps); then this project; then it is compared that all else is what it was, and sla-doctor examines
# what is there.  A second time it finds nothing missing.  docs/containers.md says more.
#
# Named overrides: PYTHON= the environment's interpreter (default: python3); DEVICE=cuda refuses one that is not for GPUs
# (default: auto); DRY_RUN=1 prints what would be installed.
# Ends with status 2 and a line for each reason where nothing was done, 1 where the environment is not as it should be.
set -eu

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    found=$("$python" -c 'import sys; print("it is Python %d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        found="it is not an interpreter that runs"
    echo "install-beside: error: PYTHON=$python cannot be used: $found; expected Python 3.12 or newer" >&2
    exit 2
fi
if ! "$python" -c 'import pip' 2>/dev/null; then
    echo "install-beside: error: PYTHON=$python has no pip: expected 22.2 or newer (on Debian: apt-get install python3-pip)" >&2
    exit 2
fi
exec "$python" "$(dirname "$0")/install_beside.py"
