"""The kernel compiles for GPUs without one at hand, and to the code that was meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_all.py")
TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "i8": 1}
RAGGED = 2


def compile_all(*targets, **variables):
    """What `compile_all.py` found, and the Triton that compiled it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, str(PROGRAM), json.dumps(targets)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    *found, last = map(json.loads, done.stdout.splitlines())
    return found, last["triton"]


def check(found):
    """Every access of the body is 128 bits wide; nothing is fused; nothing spills.

    A thread has 16 elements: so many 16-byte accesses as an element has bytes. The last
    block's bounded accesses are narrow, and so are scales and masks; they are not counted.
    """
    stored, delta, scales, keep, _ = found["variant"]
    assert found["loads"] == BYTES[stored] + BYTES[delta], found
    assert found["stores"] == BYTES[stored], found
    assert found["fused"] == 0, "a fused multiply-add changes the rounding"
    assert found["spills"] == 0, "registers spilled"
    assert found["adds_minus_zero"] == keep, "x + 0 is not x where x is -0"
    # Four blocks of 128 threads on a multiprocessor of NVIDIA's, three waves on a SIMD of AMD's.
    # Rows that end inside a block of scales take divisions; no usual model has them.
    if scales != RAGGED:
        assert found["registers"] <= (168 if found["target"] == "gfx942" else 128), found


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_every_variant_has_wide_accesses_and_neither_fuses_nor_spills(target):
    found, _ = compile_all(target)
    assert len(found) == 32
    for one in found:
        check(one)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.8.0"])
def test_older_tritons_compile_the_same(version, tmp_path):
    """3.9 is the one that is installed. Another Triton is put before it, in a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(tmp_path / "triton"), f"triton=={version}"], check=True)
    path = os.pathsep.join([str(tmp_path / "triton"), os.environ.get("PYTHONPATH", "")])
    found, used = compile_all(
        *TARGETS, PYTHONPATH=path, TRITON_CACHE_DIR=str(tmp_path / "compiled")
    )
    assert used == version
    assert len(found) == 32 * len(TARGETS)
    for one in found:
        check(one)
