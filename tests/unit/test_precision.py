"""CPUs that compute in bfloat16, by Linux' description of them."""

import pytest

from carclass.models.precision import cpu_has_fast_bf16

INTEL, AMD = "vendor_id\t: GenuineIntel", "vendor_id\t: AuthenticAMD"


@pytest.mark.parametrize(
    "cpu_info",
    [
        f"processor\t: 0\n{INTEL}\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n",
        f"processor\t: 0\n{AMD}\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1\n{AMD}\n",
        "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n",
    ],
    ids=["Intel with AMX", "AMD Zen 4", "Arm"],
)
def test_a_cpu_that_computes_bfloat16_faster_uses_it(cpu_info):
    assert cpu_has_fast_bf16(cpu_info)


@pytest.mark.parametrize(
    "cpu_info",
    [
        f"processor\t: 0\n{INTEL}\nflags\t\t: fpu avx2 avx512_bf16\n",
        f"processor\t: 0\n{INTEL}\nflags\t\t: fpu avx2\n",
        f"processor\t: 0\n{AMD}\nflags\t\t: fpu avx2 avx512f\n",
        "processor\t: 0\nFeatures\t: fp asimd\n",
        "",
    ],
    ids=["Intel without AMX", "AVX2", "AMD Zen 3", "older Arm", "unknown"],
)
def test_a_cpu_that_computes_bfloat16_slower_uses_float32(cpu_info):
    assert not cpu_has_fast_bf16(cpu_info)
