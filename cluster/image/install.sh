#!/usr/bin/env bash
# Installs carclass' locked dependencies into a virtual environment, on laptops, in CI and in the image.
#   cluster/image/install.sh VENV [LOCK ...]     default lock: requirements.lock
# Every file is checked against its sha256. PYTHON names the interpreter (default python3).
set -euo pipefail

venv=${1:?usage: install.sh VENV [LOCK ...]}
shift
folder=$(cd "$(dirname "$0")" && pwd)
[ $# -gt 0 ] || set -- "$folder/../../requirements.lock"
python=${PYTHON:-python3}

fail() {
    printf 'carclass: %s\n' "$*" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "'$python' not found. Install Python 3.11, 3.12 or 3.13, or set PYTHON=/path/to/python3.11."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case "$version" in
    3.11 | 3.12 | 3.13) ;;
    *) fail "Python $version found, 3.11, 3.12 or 3.13 needed. Install one and set PYTHON=/path/to/python3.11." ;;
esac
case "$(uname -s)-$(uname -m)" in
    Linux-x86_64 | Linux-aarch64 | Darwin-arm64) ;;
    *) fail "no Ray and torch wheels for $(uname -s) on $(uname -m). Use Linux (x86_64, aarch64), macOS on Apple silicon, or WSL 2." ;;
esac

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" ||
    fail "could not create $venv. On Debian or Ubuntu, install python3-venv first."
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$folder/uv.lock"
export VIRTUAL_ENV="$venv"
"$venv/bin/uv" pip sync --quiet --compile-bytecode --require-hashes "$@" "$folder/uv.lock"
# Detectron2 has no wheel in the registry; its compiled extension is not needed, so the wheel is built without it.
PYTHONPATH="$folder/torch_stub" "$venv/bin/uv" pip install --quiet --no-deps --no-build-isolation \
    --require-hashes -r "$folder/detectron2.lock"
