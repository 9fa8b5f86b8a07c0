"""Imports what the doctor asks about, one step after the other. A script for a fresh interpreter.

Usage: ``python -P probe.py REPORT STEP...``. Each step adds a JSON line to the file REPORT, at
once, so that the steps before a crash are known. It imports nothing at first: any import here
may be the one that fails.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any


def torch() -> dict[str, Any]:
    """Torch and its devices."""
    torch = importlib.import_module("torch")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"version": torch.__version__, "cuda": torch.cuda.is_available(), "devices": devices}


def vllm() -> dict[str, Any]:
    """VLLM, as ``import vllm`` gives it."""
    module = importlib.import_module("vllm")
    return {"version": getattr(module, "__version__", "unknown"), "path": module.__file__}


def entry_point() -> dict[str, Any]:
    """The entry point that makes the loader known to vLLM: there, and importable."""
    from importlib.metadata import entry_points

    found = list(entry_points(group="vllm.general_plugins", name="enchtable"))
    for entry in found:
        entry.load()
    return {"entry_points": [entry.value for entry in found]}


def loader() -> dict[str, Any]:
    """The loader, made as vLLM makes it: through its plugins and its table of load formats."""
    compat = importlib.import_module("enchtable_vllm.serving.compat")
    return {"loader": compat.loader_by_plugins("enchtable")}


def swapping() -> dict[str, Any]:
    """What exchanging vectors in a running server needs, and this vLLM lacks, by name."""
    compat = importlib.import_module("enchtable_vllm.serving.compat")
    return {"lacks": compat.missing_for_swapping()}


def triton() -> dict[str, Any]:
    """Triton itself."""
    return {"version": importlib.import_module("triton").__version__}


def fused_add() -> dict[str, Any]:
    """The fused addition on the device that weights go to, against the plain-torch reference."""
    torch = importlib.import_module("torch")
    kernels = importlib.import_module("enchtable_kernels")
    reference = importlib.import_module("enchtable_kernels.reference")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = torch.linspace(-3.0, 3.0, 1000, device=device)
    stored, delta = numbers.bfloat16(), (numbers.flip(0) * 0.01).bfloat16()
    merged, _ = kernels.fused_add(stored, delta, [0.7])
    expected = torch.empty_like(stored)
    addition = importlib.import_module("enchtable_kernels._addition").Addition
    reference.fused_add_reference(addition(stored, delta, expected, 0.7))
    if not torch.equal(merged.view(torch.int16), expected.view(torch.int16)):
        differ = int((merged.view(torch.int16) != expected.view(torch.int16)).sum())
        raise RuntimeError(f"{differ} of {stored.numel()} elements differ from the reference")
    return {"device": device}


def _importing(name: str) -> Callable[[], dict[str, Any]]:
    def step() -> dict[str, Any]:
        module = importlib.import_module(name)
        return {"version": getattr(module, "__version__", "unknown")}

    return step


STEPS: dict[str, Callable[[], dict[str, Any]]] = {
    step.__name__: step for step in (torch, vllm, entry_point, loader, swapping, triton, fused_add)
}
STEPS |= {name: _importing(name) for name in ("torchvision", "torchaudio", "torchcodec")}


def root_cause(error: BaseException) -> str:
    """The first error of a chain, as the last line of its traceback."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    # A message of several lines begins with what happened and goes on with advice.
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def main(report: str, names: list[str]) -> None:
    """Run the steps and report each."""
    with open(report, "a", encoding="utf-8") as file:  # noqa: PTH123 (pathlib: one more import)
        for name in names:
            line: dict[str, Any] = {"step": name}
            try:
                line["value"] = STEPS[name]()
            except BaseException as error:
                line["error"] = root_cause(error)
            file.write(json.dumps(line) + "\n")
            file.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
