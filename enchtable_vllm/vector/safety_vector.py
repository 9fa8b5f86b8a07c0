"""An opened safety vector. What it hands out has been checked on the very bytes it hands out."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError

from enchtable_vllm.checkpoint import Checkpoint, Location, TensorHeader, locate, tensor_digest
from enchtable_vllm.checkpoint.fingerprint import content_fingerprint
from enchtable_vllm.errors import NonFiniteError, SafetyVectorError, summarize_faults
from enchtable_vllm.vector.format import (
    FACTORS_FILE_STEM,
    VECTOR_FILE_STEM,
    VECTOR_MANIFEST,
    VectorManifest,
    VectorTensor,
)

#: The files of a vector in a Hub repository; its cached factors only where they are of use.
VECTOR_PATTERNS = (f"{VECTOR_FILE_STEM}.*", f"{VECTOR_FILE_STEM}-*", "README.md")
FACTORS_PATTERN = f"{FACTORS_FILE_STEM}*"


class SafetyVector:
    """A vector folder, its manifest and headers checked against each other.

    Args:
        location: Where it is.

    Attributes:
        name: The folder's or the repository's name, for people.
        manifest: What ``safety_vector.json`` says.
        fingerprint: Content: names, dtypes, shapes and the digests of every byte. The digests
            are the manifest's; `read` proves each against the bytes it returns.

    Raises:
        SafetyVectorError: The manifest is missing or malformed, or disagrees with the files.
        CheckpointError: A file is missing or truncated.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.name = location.repo_id or location.path.name
        self.what = f"safety vector '{location}'"
        self.manifest = self._read_manifest()
        self._files = Checkpoint(location.path, stem=VECTOR_FILE_STEM, what="safety vector")
        self._check_headers()
        self.fingerprint = content_fingerprint(
            (self._files.tensors[name], entry.digest)
            for name, entry in self.manifest.tensors.items()
        )

    @classmethod
    def open(
        cls,
        reference: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        factors: bool = False,
    ) -> SafetyVector:
        """Open a local folder or a Hub id; see `locate`. ``factors``: fetch those as well."""
        return cls(
            locate(
                reference,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=(*VECTOR_PATTERNS, FACTORS_PATTERN) if factors else VECTOR_PATTERNS,
                what="safety vector",
            )
        )

    @property
    def tensors(self) -> dict[str, VectorTensor]:
        """The deltas by name."""
        return self.manifest.tensors

    def header(self, name: str) -> TensorHeader:
        """What the file's header says of a delta."""
        return self._files.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """One delta, as stored, in memory of its own, digest and finiteness checked.

        Raises:
            SafetyVectorError: Its bytes are not those that the manifest vouches for.
            NonFiniteError: It holds NaN or infinity.
        """
        # A copy first: bytes that are still the file's could change after they were checked.
        delta = self._files.read(name).clone()
        digest = tensor_digest(delta)
        if digest != self.tensors[name].digest:
            raise SafetyVectorError(
                f"{self.what}, tensor '{name}'",
                expected=f"content {self.tensors[name].digest}",
                got=digest,
                fix="Its bytes changed since it was built: fetch or build it again.",
            )
        if not bool(torch.isfinite(delta).all()):
            raise NonFiniteError(
                f"{self.what}, tensor '{name}'",
                expected="finite values",
                got="NaN or infinity",
                fix="Distil it again; a diverged surrogate makes such a vector.",
            )
        return delta

    def _read_manifest(self) -> VectorManifest:
        path = self.location.path / VECTOR_MANIFEST
        if not path.is_file():
            raise SafetyVectorError(
                self.what,
                expected=f"a file '{VECTOR_MANIFEST}'",
                got="none",
                fix="Build one with 'enchtable vector build', or check the path.",
            )
        try:
            return VectorManifest.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise SafetyVectorError(
                f"{self.what}, {VECTOR_MANIFEST}",
                expected="format version 1",
                got=describe_validation_error(error),
                fix="Fetch or build the vector again, or upgrade enchtable-vllm.",
            ) from error

    def _check_headers(self) -> None:
        declared, stored = self.manifest.tensors, self._files.tensors
        faults = [f"'{n}' is in no file" for n in sorted(declared.keys() - stored.keys())]
        faults += [f"'{n}' is not in the manifest" for n in sorted(stored.keys() - declared.keys())]
        for name in sorted(declared.keys() & stored.keys()):
            entry, header = declared[name], stored[name]
            if (entry.dtype, entry.shape) != (header.dtype, header.shape):
                faults.append(
                    f"'{name}' is {header.dtype} {list(header.shape)} in '{header.file}', "
                    f"{entry.dtype} {list(entry.shape)} in the manifest"
                )
        if not declared:
            faults.append("it holds no tensor")
        if faults:
            raise SafetyVectorError(
                self.what,
                expected="files and manifest that agree",
                got=summarize_faults(faults),
                fix="Fetch or build the vector again.",
            )


def describe_validation_error(error: ValidationError) -> str:
    """Pydantic's findings in one line."""
    return summarize_faults(
        [
            f"{'.'.join(str(part) for part in item['loc']) or 'file'}: {item['msg']}"
            for item in error.errors()
        ]
    )
