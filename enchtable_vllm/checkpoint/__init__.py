"""Checkpoints on disk: finding, reading, fingerprinting and writing them, tensor by tensor."""

from enchtable_vllm.checkpoint.fingerprint import (
    Fingerprint,
    combine_digests,
    sampled_fingerprint,
    short,
    tensor_digest,
)
from enchtable_vllm.checkpoint.location import Location, local, locate, nothing_downloaded, on_hub
from enchtable_vllm.checkpoint.reader import TORCH_DTYPES, Checkpoint, TensorHeader
from enchtable_vllm.checkpoint.transaction import (
    AdditionTransaction,
    FileTransaction,
    FolderTransaction,
)
from enchtable_vllm.checkpoint.writer import ShardWriter

__all__ = [
    "TORCH_DTYPES",
    "AdditionTransaction",
    "Checkpoint",
    "FileTransaction",
    "Fingerprint",
    "FolderTransaction",
    "Location",
    "ShardWriter",
    "TensorHeader",
    "combine_digests",
    "local",
    "locate",
    "nothing_downloaded",
    "on_hub",
    "sampled_fingerprint",
    "short",
    "tensor_digest",
]
