"""Signed vectors: who vouches for a vector and its plans, by OpenSSF Model Signing.

`requirement` says who must have signed; `signature` reads a vector's signature, finds out who
did, and vouches for the bytes that are read afterwards; `folder` says which files a signature
covers; `sign` makes one. `library` is the only module that imports model_signing, which is an
extra: it is imported when a signature is asked for, and not before.
"""

from enchtable_vllm.signing.folder import check_folder
from enchtable_vllm.signing.requirement import Requirement, parse_requirement
from enchtable_vllm.signing.signature import (
    SIGNATURE_FILE,
    VectorSignature,
    open_signed,
    read_signature,
)

__all__ = [
    "SIGNATURE_FILE",
    "Requirement",
    "VectorSignature",
    "check_folder",
    "open_signed",
    "parse_requirement",
    "read_signature",
]
