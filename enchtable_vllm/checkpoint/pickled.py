"""Weights in a ``.bin``: read without running what a pickle may ask for.

Only tensors come out of `torch.load` with ``weights_only=True``; a pickle that wants anything
else is refused. The tensors stay mapped from the file, so opening one reads its headers alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from enchtable_vllm.files import open_regular

#: What a tensor in a pickle may be → how safetensors calls it.
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}


class PickledFile:
    """An opened ``.bin``, with the methods of a `SafetensorsFile`.

    Args:
        path: The file.

    Attributes:
        entries: Name → (dtype in safetensors' spelling, shape), in the file's order.
        metadata: A pickle has none; this is what safetensors files made from torch say.

    Raises:
        ValueError: It is not a plain dictionary of dense tensors, or not in torch's own zip
            format (files of before torch 1.6 are not).
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        descriptor = open_regular(path)  # torch would wait for a FIFO's writer
        self._state = _state(os.fstat(descriptor))
        os.close(descriptor)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError:
            raise
        except Exception as error:  # a damaged pickle fails in any way that Python knows
            reason = str(error).strip().splitlines() or [""]
            raise ValueError(f"{type(error).__name__}: {reason[0]}") from error
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__} where tensors by name belong")
        for name, value in state.items():
            _check(name, value)
        self._tensors: dict[str, torch.Tensor] = {n: t.detach() for n, t in state.items()}
        self.metadata = {"format": "pt"}
        self.entries = {n: (DTYPES[t.dtype], tuple(t.shape)) for n, t in self._tensors.items()}

    def is_still(self, path: Path) -> bool:
        """Whether a path leads to this very file, as it was when it was opened."""
        try:
            return _state(path.stat()) == self._state
        except OSError:
            return False

    def nbytes(self, name: str) -> int:
        """How many bytes a tensor's data takes."""
        return self._tensors[name].nbytes

    def read(self, name: str) -> torch.Tensor:
        """A tensor, row-major, in memory of its own."""
        return self._tensors[name].clone(memory_format=torch.contiguous_format)

    def read_bytes(self, name: str, at: int, count: int) -> bytes:
        """A part of a tensor's bytes; less than ``count`` at its end."""
        flat = self._tensors[name].contiguous().reshape(-1)
        return bytes(flat.view(torch.uint8).numpy().data[at : at + count]) if flat.numel() else b""

    def read_into(self, name: str, at: int, target: memoryview) -> None:
        """A part of a tensor's bytes, from ``at`` on, into memory that is there already.

        Raises:
            ValueError: The part is not all the tensor's.
        """
        target[:] = self.read_bytes(name, at, len(target))


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _check(name: object, value: object) -> None:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor with a name")
    if value.layout is not torch.strided or value.is_meta or value.dtype not in DTYPES:
        raise ValueError(f"'{name}' is {value.dtype}, {value.layout}, on '{value.device}'")
    if value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(f"'{name}' is larger than what is stored of it")
