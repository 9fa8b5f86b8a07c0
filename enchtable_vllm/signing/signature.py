"""A vector's signature, read and verified; it then vouches for bytes, one file at a time.

What a merge takes from a vector's folder is the manifest, a plan, and tensors. A signature
holds the digest of every file, but tensors of gigabytes are not read twice for it: the
manifest's own digests are checked on the bytes that are merged, and masks by the plan's. So
the manifest and the plan are what it vouches for, on the very bytes that are parsed, and
whatever is exchanged later does not fit to what they say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from enchtable_vllm.checkpoint import Location
from enchtable_vllm.errors import SignatureError
from enchtable_vllm.files import is_there, read_json
from enchtable_vllm.plan.vector_root import PLANS_FOLDER
from enchtable_vllm.signing.library import NotVerifiedError, verifier
from enchtable_vllm.signing.requirement import Requirement
from enchtable_vllm.vector import SafetyVector

#: Beside the manifest, and fetched with it.
SIGNATURE_FILE = "safety_vector.sig"

SIGN_AGAIN = "sign it again with 'enchtable vector sign', after review."
#: What a signature may name its digests by.
HASHES: dict[str, Callable[..., Any]] = {"sha256": hashlib.sha256, "blake3": blake3}


@dataclass(frozen=True)
class VectorSignature:
    """A signature that is by whom it must be.

    Attributes:
        what: The vector, for messages.
        signed_by: By whom.
        digests: File, by its path inside the vector's folder → algorithm and hex digest.
    """

    what: str
    signed_by: str
    digests: dict[str, tuple[str, str]]

    def vouch(self, file: str, data: bytes) -> None:
        """Refuse a file's bytes that are not those that were signed.

        Args:
            file: Its path inside the vector's folder.
            data: All of it.

        Raises:
            SignatureError: It was added after the signing, or changed.
        """
        signed = self.digests.get(file)
        if signed is None or _digest(signed[0], data) != signed[1]:
            raise SignatureError(
                f"{self.what}, file '{file}'",
                expected="the file that was signed" if signed else "a file that was signed",
                got="another of this name" if signed else "one that the signature does not name",
                fix=f"Restore the file. If it is as it should be: {SIGN_AGAIN}",
            )

    def vouch_plan(self, path: Path, data: bytes) -> None:
        """Refuse a plan that was not signed with the vector, wherever it lies.

        Args:
            path: Its file, for the message.
            data: All of it.

        Raises:
            SignatureError: None of the signed plans has these bytes.
        """
        digests = {algorithm: _digest(algorithm, data) for algorithm in HASHES}
        signed = (entry for file, entry in self.digests.items() if is_plan(file))
        if not any(digests[algorithm] == digest for algorithm, digest in signed):
            raise SignatureError(
                f"merge plan '{path}' of {self.what}",
                expected="a plan that was signed with its vector",
                got="one that was added or changed since, or never was in the vector's folder",
                fix=f"Put it into the vector's folder, under plans/, and {SIGN_AGAIN}",
            )


def is_plan(file: str) -> bool:
    """Whether a file of a vector's folder, by its path inside it, is a plan."""
    return file.startswith(f"{PLANS_FOLDER}/") and file.endswith(".json")


def read_signature(location: Location, requirement: Requirement) -> VectorSignature:
    """The signature in a vector's folder.

    Args:
        location: The vector's.
        requirement: Who must have signed.

    Raises:
        ConfigError: The requirement's key or certificates cannot be used.
        SignatureError: There is none, or it is not by whom it must be.
    """
    required = verifier(requirement)
    what = f"safety vector '{location}'"
    try:
        path = location.path / SIGNATURE_FILE
        if not is_there(path):
            raise NotVerifiedError(f"none: there is no '{SIGNATURE_FILE}'")
        found = required.check(read_json(path)[1])
        if not found.by_file:
            raise NotVerifiedError("one of shards of files: sign whole files")
        if unknown := {algorithm for algorithm, _ in found.digests.values()} - HASHES.keys():
            raise NotVerifiedError(f"one of digests by {sorted(unknown)}, not {sorted(HASHES)}")
    except (NotVerifiedError, OSError, ValueError) as error:
        raise SignatureError(
            what,
            expected=f"a signature by {required.accepts}",
            got=error,
            fix=f"Do not serve it. If it is yours: {SIGN_AGAIN}",
        ) from error
    return VectorSignature(what, found.signed_by, found.digests)


def open_signed(
    location: Location, requirement: Requirement | None
) -> tuple[SafetyVector, VectorSignature | None]:
    """A vector, whose manifest is the one that was signed, where a signature is required.

    Raises:
        EnchTableError: As `read_signature`, `VectorSignature.vouch` and `SafetyVector`.
    """
    if requirement is None:
        return SafetyVector(location), None
    signature = read_signature(location, requirement)
    return SafetyVector(location, vouch=signature.vouch), signature


def _digest(algorithm: str, data: bytes) -> str:
    return str(HASHES[algorithm](data).hexdigest())
