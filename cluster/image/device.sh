#!/usr/bin/env bash
# Fits an installed environment to the machines it is for.
#   cluster/image/device.sh VENV cuda|cpu
# The registry's torch is one build for GPUs and CPUs. cuda keeps all that came with it; cpu takes out what only GPU
# code calls. The rest of CUDA stays in both: torch's libraries are linked against it and can't be loaded without.
set -euo pipefail

venv=${1:?usage: device.sh VENV cuda|cpu}
device=${2:?usage: device.sh VENV cuda|cpu}
gpu_only=(triton nvidia-cusolver nvidia-nvtx cuda-bindings cuda-pathfinder cuda-toolkit)

case "$device" in
    cuda) ;;
    cpu) VIRTUAL_ENV="$venv" "$venv/bin/uv" pip uninstall --quiet "${gpu_only[@]}" ;;
    *)
        printf 'carclass: DEVICE is %s; give cuda or cpu.\n' "$device" >&2
        exit 1
        ;;
esac
