"""Precision of a device's arithmetic: bfloat16 only where it is faster than float32.

Elsewhere it takes longer to train a ResNet50: measured 1.4 times as long with Intel's AVX512-BF16 without AMX, and 15
times with PyTorch and oneDNN limited to AVX2.
"""

from functools import cache
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]
CPU_INFO = Path("/proc/cpuinfo")
"""Description of the CPUs on Linux; a CPU of another system counts as one without bfloat16."""


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Return True if a network of this precision computes in bfloat16 on a device of this process."""
    return precision == "bf16" and _has_fast_bf16(device.type)


@cache
def _has_fast_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return CPU_INFO.exists() and cpu_has_fast_bf16(CPU_INFO.read_text())


def cpu_has_fast_bf16(cpu_info: str) -> bool:
    """Return True for Linux' description of a CPU with AMX, with AMD's AVX512-BF16 or with Arm's bfloat16.

    Decided by name, not by measuring, so that a run is resumed in the precision in which it was interrupted.
    """
    lines = (line.partition(":") for line in cpu_info.splitlines())
    facts = {name.strip(): value.split() for name, _, value in lines}
    flags = {*facts.get("flags", []), *facts.get("Features", [])}  # on x86 and on Arm
    is_amd = facts.get("vendor_id") == ["AuthenticAMD"]
    return bool(flags & {"amx_bf16", "bf16"}) or (is_amd and "avx512_bf16" in flags)
