"""Writing safetensors as a stream: the header first, then tensor by tensor.

safetensors' own writer wants a whole file's tensors in memory. The format needs less: names,
dtypes and shapes fix every offset, so a shard of any size is written with one tensor at hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from enchtable_vllm.checkpoint.fingerprint import raw_bytes
from enchtable_vllm.checkpoint.reader import TensorHeader
from enchtable_vllm.checkpoint.safetensors_file import STORED_DTYPES, stored_bytes
from enchtable_vllm.errors import CheckpointError


def tensor_bytes(header: TensorHeader) -> int:
    """How many bytes a tensor's data takes.

    Raises:
        CheckpointError: Its dtype is not known.
    """
    size = stored_bytes(header.dtype, header.shape)
    if size is None:
        raise CheckpointError(
            f"file '{header.file}', tensor '{header.name}'",
            expected=f"a dtype among {sorted(STORED_DTYPES)}",
            got=header.dtype,
            fix="Convert the checkpoint.",
        )
    return size


def assign_shards(
    headers: Sequence[TensorHeader], stem: str, max_shard_bytes: int
) -> dict[str, list[TensorHeader]]:
    """Fill shards in order; one file when everything fits.

    Returns:
        File name → its tensors: ``{stem}.safetensors``, or ``{stem}-00001-of-0000N.safetensors``.
    """
    shards: list[list[TensorHeader]] = []
    room = 0
    for header in headers:
        size = tensor_bytes(header)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(header)
        room -= size
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {
        f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards)
    }


def write_index(folder: Path, stem: str, shards: Mapping[str, Sequence[TensorHeader]]) -> None:
    """``{stem}.safetensors.index.json``, where there is more than one shard."""
    if len(shards) < 2:
        return
    total = sum(tensor_bytes(header) for shard in shards.values() for header in shard)
    names = {header.name: file for file, shard in shards.items() for header in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class ShardWriter:
    """One safetensors file; its tensors may be written in any order.

    Use as a context manager: leaving it flushes to the disk, and every tensor must have been
    written by then.

    Args:
        path: The file.
        headers: Name, dtype and shape of every tensor, in the order of their bytes.
        metadata: Free-form header metadata.
    """

    def __init__(
        self, path: Path, headers: Sequence[TensorHeader], metadata: Mapping[str, str]
    ) -> None:
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._pending: dict[str, tuple[int, int]] = {}  # offsets of begin and end
        offset = 0
        for header in headers:
            end = offset + tensor_bytes(header)
            self._pending[header.name] = offset, end
            entries[header.name] = {
                "dtype": header.dtype,
                "shape": list(header.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = len(encoded).to_bytes(8, "little") + encoded
        self._file = path.open("xb")
        self._data_start = len(self._start)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that is still to be written, of its header's size."""
        begin, end = self._pending.pop(name)
        data = raw_bytes(tensor)
        if len(data) != end - begin:
            raise AssertionError(f"expected {end - begin} bytes for '{name}', got {len(data)}")
        self._file.seek(self._data_start + begin)
        self._file.write(data)

    def __enter__(self) -> Self:
        try:
            self._file.write(self._start)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                if self._pending:
                    raise AssertionError(f"{len(self._pending)} tensors were not written")
                self._file.flush()
                os.fsync(self._file.fileno())
