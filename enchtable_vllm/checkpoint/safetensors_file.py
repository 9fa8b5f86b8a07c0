"""One safetensors file: its header checked by the library, its bytes read, not mapped.

A mapping would be faster to set up, but a file that shrinks under one kills the process
(SIGBUS), and bytes that are still the file's can change between their check and their use.
"""

from __future__ import annotations

import math
import os
import weakref
from pathlib import Path

import torch
from safetensors import safe_open

from enchtable_vllm.files import open_regular, parse_json

#: safetensors' dtype names, as torch's.
STORED_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

_LENGTH_BYTES = 8  # of the header's length, before it


class SafetensorsFile:
    """An opened file, which stays the file it was.

    If another takes its name meanwhile, this one is read on; if it is written to, it is refused.

    Args:
        path: The file.

    Attributes:
        entries: Name → (dtype in safetensors' spelling, shape), in the order of their bytes.
        metadata: The header's free-form part.

    Raises:
        OSError, ValueError: It cannot be opened, is no file, or its header holds a name twice.
        SafetensorError: It is truncated, or its header is wrong.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = open_regular(path)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = self._stat()
        # By descriptor: the path may lead to another file by now.
        with safe_open(f"/dev/fd/{self._descriptor}", framework="pt") as handle:
            names: list[str] = list(handle.offset_keys())
        size = int.from_bytes(self._bytes(0, _LENGTH_BYTES), "little")
        header = parse_json(self._bytes(_LENGTH_BYTES, size))
        data = _LENGTH_BYTES + size
        self.metadata: dict[str, str] = header.get("__metadata__") or {}
        self.entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        for name in names:
            entry = header[name]
            start, end = entry["data_offsets"]
            self.entries[name] = (entry["dtype"], tuple(entry["shape"]))
            self._places[name] = (data + start, end - start)

    def is_still(self, path: Path) -> bool:
        """Whether a path leads to this very file, as it was when it was opened."""
        try:
            found = path.stat()
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._descriptor)) and self._stat() == self._state

    def nbytes(self, name: str) -> int:
        """How many bytes a tensor's data takes."""
        return self._places[name][1]

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in memory of its own.

        Raises:
            OSError, ValueError: The file was written to since it was opened, cannot be read any
                more, or holds more than fits into memory.
        """
        dtype, shape = self.entries[name]
        if dtype not in STORED_DTYPES:
            raise ValueError(f"dtype {dtype}")
        start, size = self._places[name]
        try:
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:  # torch's way to say that memory is short
            raise ValueError(f"{size:,} bytes that do not fit into memory") from error
        self._fill(buffer.numpy().data, start)
        return buffer.view(STORED_DTYPES[dtype]).reshape(shape)

    def read_bytes(self, name: str, at: int, count: int) -> bytes:
        """A part of a tensor's bytes; less than ``count`` at its end.

        Raises:
            OSError, ValueError: As `read`.
        """
        start, size = self._places[name]
        return self._bytes(start + at, max(0, min(count, size - at)))

    def read_into(self, name: str, at: int, target: memoryview) -> None:
        """A part of a tensor's bytes, from ``at`` on, into memory that is there already.

        Raises:
            OSError, ValueError: As `read`, or the part is not all the tensor's.
        """
        start, size = self._places[name]
        if at + len(target) > size:
            raise ValueError(f"bytes {at} to {at + len(target)} of {size}")
        self._fill(target, start + at)

    def _bytes(self, start: int, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data), start)
        return bytes(data)

    def _fill(self, target: memoryview, start: int) -> None:
        done = 0
        while done < len(target):
            got = os.preadv(self._descriptor, [target[done:]], start + done)
            if got == 0:
                break  # it became shorter
            done += got
        if self._stat() != self._state:
            raise ValueError("a file that was written to while it was read")

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """How many bytes such a tensor takes; None if the dtype is not known."""
    return math.prod(shape) * STORED_DTYPES[dtype].itemsize if dtype in STORED_DTYPES else None
