"""Compiles every variant of the kernel for the GPUs named, without one; prints JSON lines.

A program of its own, because Triton's interpreter, which other tests use, is for good. Usage:
``python compile_all.py '[["cuda", 90, 32], …]'``; each line is one variant: target, dtypes,
options, its assembly's memory accesses, registers and spills (on NVIDIA's warps and shared memory
too), and whether what a mask leaves out gets -0 added, bit for bit.
"""

import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from enchtable_kernels.triton_add import (
    BLOCK,
    NO_SCALES,
    RAGGED_SCALES,
    WHOLE_SCALES,
    compiler_options,
    fused_add_kernel,
)

DELTAS = (("bf16", NO_SCALES), ("fp32", NO_SCALES), ("i8", WHOLE_SCALES), ("i8", RAGGED_SCALES))
ARGUMENTS = {
    "sums_ptr": "*fp32", "coefficient": "fp32", "row_length": "i64", "row_scales": "i64",
    "key_low": "i32", "key_high": "i32", "first": "i64", "count": "i64", "SCALES": "constexpr",
    "HAS_KEEP": "constexpr", "STOCHASTIC": "constexpr", "BLOCK": "constexpr",
}  # fmt: skip


def variants():
    """Whatever a model, a vector and a plan can ask for."""
    for stored, (delta, scales), keep in itertools.product(
        ("bf16", "fp16", "fp32"), DELTAS, (False, True)
    ):
        for stochastic in (False, True) if stored == "bf16" else (False,):
            yield stored, delta, scales, keep, stochastic


def compile_one(target, stored, delta, scales, keep, stochastic):
    """Pointers are aligned, as torch's are; the count is not a multiple of anything."""
    pointers = {
        "stored_ptr": f"*{stored}", "delta_ptr": f"*{delta}", "out_ptr": f"*{stored}",
        "scales_ptr": f"*{stored}" if scales == NO_SCALES else "*fp32",
        "keep_ptr": "*u8" if keep else f"*{stored}",
    }  # fmt: skip
    constants = {"SCALES": scales, "HAS_KEEP": keep, "STOCHASTIC": stochastic, "BLOCK": BLOCK}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(6)}
    made = triton.compile(
        ASTSource(fused_add_kernel, pointers | ARGUMENTS, constants, aligned),
        target=target,
        options=compiler_options(target.backend == "hip", scales),
    )
    found = of_amd(made) if target.backend == "hip" else of_nvidia(made)
    return found | {"adds_minus_zero": "dense<-2147483648>" in made.asm["ttir"]}


def of_nvidia(made):
    ptx = made.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return {
        "loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "fused": len(re.findall(r"\bfma\.rn\S*\.f32", ptx)),
        "registers": int(found[1]),
        "spills": int(found[2]) + int(found[3]),
        "shared": made.metadata.shared,
        "warps": made.metadata.num_warps,
    }


def of_amd(made):
    assembly = made.asm["amdgcn"]

    def said(key):
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    return {
        "loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        "stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)),
        "fused": len(re.findall(r"\bv_(?:pk_)?fma_f32|\bv_fmac_f32|\bv_mad_f32", assembly)),
        "registers": said("vgpr_count"),
        "spills": said("vgpr_spill_count") + said("private_segment_fixed_size"),
    }


if __name__ == "__main__":
    for backend, arch, width in json.loads(sys.argv[1]):
        for variant in variants():
            found = compile_one(GPUTarget(backend, arch, width), *variant)
            print(json.dumps({"target": arch, "variant": variant, **found}), flush=True)
    print(json.dumps({"triton": triton.__version__}))
