"""Fingerprints: cheap ones that tell checkpoints apart, exact ones that vouch for bytes.

*Sampled*: blake3 over the sorted (name, dtype, shape, 4 KiB from the beginning, the middle
and the end of the tensor's bytes). One fine-tune differs from another almost everywhere, so
this tells them apart at the cost of a few reads a tensor.

*Content*: blake3 over the sorted (name, dtype, shape, digest of every byte).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
from blake3 import blake3
from pydantic import StringConstraints

from enchtable_vllm.checkpoint.reader import Checkpoint, TensorHeader

#: ``blake3:`` and 64 hex digits.
Fingerprint = Annotated[str, StringConstraints(pattern=r"^blake3:[0-9a-f]{64}$")]

_SAMPLE_BYTES = 4096


def short(fingerprint: str) -> str:
    """The first twelve hex digits: enough for a log line and for a person to compare."""
    return fingerprint.removeprefix("blake3:")[:12]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, in row-major order, without a copy if it is contiguous on the CPU."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def tensor_digest(tensor: torch.Tensor) -> str:
    """``blake3:…`` of a tensor's bytes. On all cores: hashing must not slow loading down."""
    return f"blake3:{blake3(raw_bytes(tensor)).hexdigest()}"


def sampled_fingerprint(checkpoint: Checkpoint) -> str:
    """The sampled fingerprint of a checkpoint."""
    return _combine(
        (header, _sample(checkpoint, header.name)) for header in checkpoint.tensors.values()
    )


def content_fingerprint(digests: Iterable[tuple[TensorHeader, str]]) -> str:
    """One fingerprint from the content digests of all tensors."""
    return _combine((header, digest.encode()) for header, digest in digests)


def combine_digests(digests: Mapping[str, str]) -> str:
    """One digest of many named ones, whatever the order they were taken in."""
    return f"blake3:{blake3(json.dumps(sorted(digests.items())).encode()).hexdigest()}"


def _sample(checkpoint: Checkpoint, name: str) -> bytes:
    end = max(0, checkpoint.nbytes(name) - _SAMPLE_BYTES)
    return b"".join(checkpoint.read_bytes(name, at, _SAMPLE_BYTES) for at in (0, end // 2, end))


def _combine(parts: Iterable[tuple[TensorHeader, bytes]]) -> str:
    hasher = blake3()
    for header, payload in sorted(parts, key=lambda part: part[0].name):
        head = json.dumps([header.name, header.dtype, list(header.shape), len(payload)])
        hasher.update(head.encode())
        hasher.update(payload)
    return f"blake3:{hasher.hexdigest()}"
