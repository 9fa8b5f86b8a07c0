"""Registers, spills and occupancy of every variant, from the compiler: no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import Row, row
from benchmarks.kernels_cases import Variant
from benchmarks.kernels_occupancy import Usage, occupancy

#: The one that the tests hold to its bounds.
_PROGRAM = Path(__file__).parent.parent / "tests" / "kernels" / "compile_all.py"
_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "i8": torch.int8,
}
_RAGGED = 2


def registers(capability: int) -> Iterator[Row]:
    """Compile every variant for an NVIDIA GPU of that compute capability: 90 is 9.0."""
    targets = json.dumps([["cuda", capability, 32]])
    # Triton's interpreter, where a variable asks for it, compiles nothing.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(_PROGRAM), targets]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    for found in map(json.loads, done.stdout.splitlines()[:-1]):
        stored, delta, scales, keep, stochastic = found["variant"]
        variant = Variant(_DTYPES[stored], _DTYPES[delta], scales == _RAGGED, keep, stochastic)
        usage = Usage(found["warps"], found["registers"], found["shared"])
        for metric, value, unit in (
            ("registers", found["registers"], "a thread"),
            ("spills", found["spills"], "B"),
            ("occupancy", occupancy(usage, capability), "of a multiprocessor's warps"),
        ):
            if value is not None:
                yield row(
                    "compiled", f"sm_{capability}", variant, variant.dtype, [value],
                    metric=metric, unit=unit,
                )  # fmt: skip
