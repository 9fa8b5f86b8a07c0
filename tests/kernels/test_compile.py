"""The kernel compiles for GPUs without one at hand, and to the code that was meant."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest

# In a process of its own, because Triton's interpreter, which other tests use, is for good.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from enchtable_kernels.triton_add import BLOCK, NUM_WARPS, fused_add_kernel

def compile_one(backend, arch, warp, stored, delta, keep):
    signature = {
        "stored_ptr": f"*{stored}", "delta_ptr": f"*{delta}", "out_ptr": f"*{stored}",
        "keep_ptr": "*u8" if keep else f"*{stored}", "sums_ptr": "*fp32", "coefficient": "fp32",
        "keep_start": "i64", "count": "i64", "HAS_KEEP": "constexpr", "BLOCK": "constexpr",
    }
    source = ASTSource(
        fused_add_kernel, signature, {"HAS_KEEP": keep, "BLOCK": BLOCK},
        {(i,): [["tt.divisibility", 16]] for i in range(5)},
    )
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    return made.asm["ptx" if backend == "cuda" else "amdgcn"]

print(json.dumps([compile_one(*variant) for variant in json.loads(sys.argv[1])]))
"""
HOPPER = [
    ("cuda", 90, 32, *kinds)
    for kinds in itertools.product(("bf16", "fp16", "fp32"), ("bf16", "fp32"), (False, True))
]
OTHERS = [("cuda", 80, 32, "bf16", "bf16", False), ("hip", "gfx942", 64, "bf16", "bf16", False)]


@pytest.fixture(scope="module")
def assembly():
    """Variant → the machine's assembly."""
    variants = HOPPER + OTHERS
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(variants)],
        check=True,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    return dict(zip(variants, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("variant", HOPPER, ids=str)
def test_for_hopper_it_moves_128_bits_and_does_not_fuse(assembly, variant):
    ptx = assembly[variant]
    # The unbounded body: a 128-bit load for each input, and a 128-bit store.
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 2
    assert re.search(r"st\.global\S*\.v4\.b32", ptx)
    assert not re.search(r"\bfma\.rn\.f32", ptx), "a fused multiply-add changes the rounding"
    assert not re.search(r"\b(ld|st)\.local", ptx), "registers spilled"


def test_it_compiles_for_other_gpus(assembly):
    assert ".target sm_80" in assembly[OTHERS[0]]
    assert "gfx942" in assembly[OTHERS[1]]
