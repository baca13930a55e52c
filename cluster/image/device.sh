#!/usr/bin/env bash
# Adapts an installed environment to a device, and removes its installers.
#   cluster/image/device.sh VENV cuda|cpu
# The registry's torch is one build for GPUs and CPUs. cuda keeps all of its dependencies; cpu removes those that only
# GPU code calls. The rest of CUDA stays in both, because torch's libraries are linked against it.
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
"$(dirname "$0")/remove_installers.sh" "$venv"
