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
import json, pathlib, subprocess, sys, tempfile
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
    if backend != "cuda":
        return made.asm["amdgcn"], ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return made.asm["ptx"], usage

print(json.dumps([compile_one(*variant) for variant in json.loads(sys.argv[1])]))
"""
HOPPER = [
    ("cuda", 90, 32, *kinds)
    for kinds in itertools.product(("bf16", "fp16", "fp32"), ("bf16", "fp32"), (False, True))
]
OTHERS = [("cuda", 80, 32, "bf16", "bf16", False), ("hip", "gfx942", 64, "bf16", "bf16", False)]


@pytest.fixture(scope="module")
def assembly():
    """Variant → (the target's assembly, what cuobjdump says of the binary)."""
    variants = HOPPER + OTHERS
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(variants)],
        check=True,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    return dict(zip(variants, json.loads(done.stdout), strict=True))


BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@pytest.mark.parametrize("variant", HOPPER, ids=str)
def test_for_hopper_every_access_of_the_body_is_128_bits_wide(assembly, variant):
    """2048 elements on 128 threads are 16 a thread: so many 16-byte accesses as an element has
    bytes. The last block's bounded accesses are narrow, and are not counted here."""
    ptx, _ = assembly[variant]
    stored, delta = (BYTES[name] for name in variant[3:5])
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == stored + delta
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == stored


@pytest.mark.parametrize("variant", [v for v in HOPPER + OTHERS if v[0] == "cuda"], ids=str)
def test_nothing_is_fused_and_nothing_spills(assembly, variant):
    ptx, usage = assembly[variant]
    assert not re.search(r"\bfma\.rn\.f32", ptx), "a fused multiply-add changes the rounding"
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    assert (stack, local) == (0, 0), "registers spilled"
    assert registers <= 128  # four blocks of 128 threads on a multiprocessor, at the least


def test_it_compiles_for_other_gpus(assembly):
    assert ".target sm_80" in assembly[OTHERS[0]][0]
    assert "gfx942" in assembly[OTHERS[1]][0]
