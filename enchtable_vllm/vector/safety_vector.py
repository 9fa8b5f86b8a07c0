"""An opened safety vector. What it hands out has been checked on the very bytes it hands out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from blake3 import blake3
from pydantic import ValidationError

from enchtable_vllm.checkpoint import Checkpoint, Location, locate, tensor_digest
from enchtable_vllm.checkpoint.fingerprint import content_fingerprint
from enchtable_vllm.checkpoint.norm import finite_norm
from enchtable_vllm.checkpoint.safetensors_file import STORED_DTYPES
from enchtable_vllm.errors import SafetyVectorError, summarize_faults
from enchtable_vllm.files import is_there, read_json, refuse_link_out
from enchtable_vllm.vector.delta import Delta
from enchtable_vllm.vector.format import (
    FACTORS_FILE_STEM,
    SCALE,
    VECTOR_FILE_STEM,
    VECTOR_MANIFEST,
    StoredTensor,
    VectorManifest,
    VectorTensor,
)

#: The files of a vector in a Hub repository; its cached factors only where they are of use.
VECTOR_PATTERNS = (f"{VECTOR_FILE_STEM}.*", f"{VECTOR_FILE_STEM}-*", "README.md")
FACTORS_PATTERN = f"{FACTORS_FILE_STEM}*"

#: Refuses a file by its name and its bytes, before they are parsed.
Vouch = Callable[[str, bytes], None]


class SafetyVector:
    """A vector folder, its manifest and headers checked against each other.

    Args:
        location: Where it is.
        vouch: Asked for the manifest, which holds the digests of all else: whether it was signed.

    Attributes:
        name: The folder's or the repository's name, for people.
        manifest: What ``safety_vector.json`` says.
        fingerprint: Content: names, dtypes, shapes and the digests of every byte. The digests
            are the manifest's; `read` proves each against the bytes it returns.

    Raises:
        SafetyVectorError: The manifest is missing or malformed, or disagrees with the files.
        CheckpointError: A file is missing or truncated.
        SignatureError: By ``vouch``.
    """

    def __init__(self, location: Location, *, vouch: Vouch = lambda _file, _data: None) -> None:
        self.location = location
        self.name = location.repo_id or location.path.name
        self.what = f"safety vector '{location}'"
        self._refuse_links_out()
        self.manifest = self._read_manifest(vouch)
        self._files = Checkpoint(location.path, stem=VECTOR_FILE_STEM, what="safety vector")
        self._check_headers()
        self.fingerprint = content_fingerprint(
            (self._files.tensors[stored.name], stored.digest) for stored in self._stored()
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

    def nbytes(self, name: str) -> int:
        """How many bytes a delta takes, as it is stored."""
        return sum(self._files.nbytes(stored.name) for stored in self.tensors[name].stored(name))

    def read(self, name: str) -> Delta:
        """One delta, as stored, in memory of its own, its digest checked.

        Whether it is finite shows where it is used: in the sums of the addition, in a norm.

        Raises:
            SafetyVectorError: Its bytes are not those that the manifest vouches for, or a scale
                is negative or not finite.
        """
        return Delta(self._verified(self.tensors[name].stored(name)[0]), self.scales(name))

    def dtype(self, name: str) -> torch.dtype:
        """Of a delta's values, as they are stored."""
        return STORED_DTYPES[self.tensors[name].dtype]

    def scales(self, name: str) -> torch.Tensor | None:
        """The scales of an int8 delta, checked as by `read`; None of any other."""
        _, *stored = self.tensors[name].stored(name)
        if not stored:
            return None
        scales = self._verified(stored[0])
        if not bool(((scales >= 0) & (scales < math.inf)).all()):
            raise SafetyVectorError(
                f"{self.what}, tensor '{name}{SCALE}'",
                expected="scales that are finite and not negative",
                got="others",
                fix="Build it again with 'enchtable vector build'.",
            )
        return scales

    @contextmanager
    def reader(self, name: str) -> Iterator[Callable[[memoryview], None]]:
        """Reads a delta's values in pieces, in order, each into memory that is there already.

        Their digest is checked at the end: nothing that was made of them may be used before.

        Yields:
            A function that fills its argument with the next bytes.

        Raises:
            SafetyVectorError: As `read`.
        """
        stored = self.tensors[name].stored(name)[0]
        hasher, at = blake3(), 0

        def read(memory: memoryview) -> None:
            nonlocal at
            self._files.read_into(name, at, memory)
            hasher.update(memory)
            at += len(memory)

        yield read
        self._refuse_other_bytes(stored, f"blake3:{hasher.hexdigest()}")

    def dense(self, name: str) -> tuple[torch.Tensor, float]:
        """A delta's values in fp32, and their norm: finite, and what the manifest says.

        Raises:
            SafetyVectorError: As `read`, or the norm is another.
            NonFiniteError: It holds NaN or infinity.
        """
        values = self.read(name).float()
        norm, declared = (
            finite_norm(values, f"{self.what}, tensor '{name}'"),
            self.tensors[name].norm,
        )
        if not math.isclose(norm, declared, rel_tol=1e-6):
            raise SafetyVectorError(
                f"{self.what}, tensor '{name}'",
                expected=f"norm {declared}",
                got=norm,
                fix="The manifest was edited: fetch or build the vector again.",
            )
        return values, norm

    def _verified(self, stored: StoredTensor) -> torch.Tensor:
        tensor = self._files.read(stored.name)
        self._refuse_other_bytes(stored, tensor_digest(tensor))
        return tensor

    def _refuse_other_bytes(self, stored: StoredTensor, digest: str) -> None:
        if digest != stored.digest:
            raise SafetyVectorError(
                f"{self.what}, tensor '{stored.name}'",
                expected=f"content {stored.digest}",
                got=digest,
                fix="Its bytes changed since it was built: fetch or build it again.",
            )

    def _refuse_links_out(self) -> None:
        """A vector is read from its own folder; a Hub cache's snapshot, from its own blobs."""
        home = self.location.home
        try:
            for path in sorted(self.location.path.iterdir()):
                if path.name.startswith(VECTOR_FILE_STEM):
                    refuse_link_out(path, home)
        except (FileNotFoundError, NotADirectoryError):
            return  # told by what is missing
        except (OSError, ValueError) as error:
            raise SafetyVectorError(
                self.what,
                expected="a readable folder that holds its files itself",
                got=error,
                fix="Check the path, and put the files themselves there.",
            ) from error

    def _read_manifest(self, vouch: Vouch) -> VectorManifest:
        path = self.location.path / VECTOR_MANIFEST
        if not is_there(path):
            raise SafetyVectorError(
                self.what,
                expected=f"a file '{VECTOR_MANIFEST}'",
                got="none",
                fix="Build one with 'enchtable vector build', or check the path.",
            )
        try:
            _, data = read_json(path)
            vouch(VECTOR_MANIFEST, data)
            return VectorManifest.model_validate_json(data)
        except (OSError, ValueError) as error:  # a ValidationError is a ValueError
            raise SafetyVectorError(
                f"{self.what}, {VECTOR_MANIFEST}",
                expected="format version 1",
                got=describe_fault(error),
                fix="Fetch or build the vector again, or upgrade enchtable-vllm.",
            ) from error

    def _stored(self) -> list[StoredTensor]:
        return [held for name, t in self.manifest.tensors.items() for held in t.stored(name)]

    def _check_headers(self) -> None:
        declared = {stored.name: stored for stored in self._stored()}
        stored = self._files.tensors
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


def describe_fault(error: Exception) -> str:
    """An error in one line; of pydantic's, its findings."""
    if not isinstance(error, ValidationError):
        return str(error)
    return summarize_faults(
        [
            f"{'.'.join(str(part) for part in item['loc']) or 'file'}: {item['msg']}"
            for item in error.errors()
        ]
    )
