#!/usr/bin/env bash
# Removes installers of Python packages: a node runs packages and never installs any.
#   cluster/image/remove_installers.sh [VENV]     without VENV: the system's Python
set -euo pipefail

if [ $# -gt 0 ]; then
    # virtualenv contains pip; Ray needs it only for runtime environments that install packages. The rest serves virtualenv.
    VIRTUAL_ENV="$1" "$1/bin/uv" pip uninstall --quiet uv pip virtualenv distlib platformdirs python-discovery
else
    set -- /usr/lib /usr/local /usr/share # python:*-slim has pip below /usr/local, Debian wheels for venv below /usr/share
fi
find "$@" -xdev \( -name ensurepip -o -name pip -o -name 'pip[0-9]*' -o -name 'pip-*' \) -prune -exec rm -rf {} +
