"""OpenSSF Model Signing: the one module that imports it.

Its interface hashes a whole folder whenever it verifies. Here a vector's bytes are checked as
they are read, so all that is wanted of it is who signed, and which digests: what its verifiers
return, one step below that interface. The extra ``signing`` bounds its version for that reason.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enchtable_vllm.errors import ConfigError, summarize_faults
from enchtable_vllm.files import open_regular
from enchtable_vllm.signing.requirement import (
    RequireCertificate,
    RequireKey,
    Requirement,
    RequireSigstore,
)

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_OPTION = "require_signature"
#: More than any key, certificate bundle or trust configuration has.
_MOST_BYTES = 10_000_000


class NotVerifiedError(Exception):
    """The signature is not one that was asked for; the message says why."""


@dataclass(frozen=True)
class Verified:
    """What a verified signature says.

    Attributes:
        signed_by: The method and the identity, for people: ``key sha256:…``.
        by_file: Whether its digests are those of whole files.
        digests: File, by its path inside the folder → algorithm and hex digest.
    """

    signed_by: str
    by_file: bool
    digests: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Verifier:
    """Verifies signatures for one requirement.

    Attributes:
        accepts: Whose, for people.
        check: Takes a signature's bytes; raises `NotVerifiedError`.
    """

    accepts: str
    check: Callable[[bytes], Verified]


def verifier(requirement: Requirement) -> Verifier:
    """What verifies signatures for a requirement; everything it names has been read.

    Raises:
        ConfigError: model-signing is not installed, or a key or certificate cannot be used.
    """
    match requirement:
        case RequireKey():
            return _any_of([_with_key(path) for path in requirement.files])
        case RequireCertificate():
            return _with_certificate(requirement)
        case RequireSigstore():
            return _with_sigstore(requirement)


def sign_files(config: Any, folder: Path, files: Sequence[str], signature: str) -> bytes:
    """A signature over these files of a folder, where the library would take all, hidden ones too.

    Args:
        config: Of ``model_signing.signing``, with whoever signs.
        folder: The folder.
        files: Paths inside it.
        signature: The name that the signature will have there: never a part of what it covers.
    """
    from model_signing import hashing

    class Covered(hashing.Config):
        def hash(self, model_path: Any, **_: Any) -> Any:
            return super().hash(model_path, files_to_hash=[folder / name for name in files])

    covered = Covered()  # type: ignore[no-untyped-call]  # the library's own
    covered.set_ignored_paths(paths=[signature])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, signature)
        config.set_hashing_config(covered).sign(folder, path)
        return path.read_bytes()


def key_fingerprint(pem: bytes) -> str:
    """``sha256:`` of a public key in DER: what ``openssl pkey -pubin -outform DER`` writes."""
    from cryptography.hazmat.primitives import serialization as s

    der = s.load_pem_public_key(pem).public_bytes(
        s.Encoding.DER, s.PublicFormat.SubjectPublicKeyInfo
    )
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def _with_key(path: Path) -> Verifier:
    signing = import_library()
    with _usable(f"{_OPTION}, public key '{path}'", "a PEM file with an ECDSA public key"):
        pem = _read(path)
        name = f"key {key_fingerprint(pem)}"
        with _as_file(pem) as copy:
            config = signing.verifying.Config().use_elliptic_key_verifier(public_key=copy)
    return Verifier(name, lambda data: _verified(config, _bundle(data), lambda _: name))


def _with_certificate(requirement: RequireCertificate) -> Verifier:
    signing = import_library()
    paths = requirement.files
    names = ", ".join(f"'{path}'" for path in paths)
    subject = f"{_OPTION}, certificates {names}"
    with (
        _usable(subject, "PEM files with certificates"),
        _as_file(b"\n".join(map(_read, paths))) as copy,
    ):
        config = signing.verifying.Config().use_certificate_verifier(certificate_chain=[copy])

    def signer(bundle: Any) -> str:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        chain = bundle.bundle.verification_material.x509_certificate_chain.certificates
        certificate = x509.load_der_x509_certificate(chain[0].raw_bytes)
        if requirement.identity not in (found := _names(certificate)):
            raise NotVerifiedError(f"the certificate of {found}, not of '{requirement.identity}'")
        fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
        return f"certificate {requirement.identity} (sha256:{fingerprint})"

    accepts = f"certificate {requirement.identity}, vouched for by {names}"
    return Verifier(accepts, lambda data: _verified(config, _bundle(data), signer))


def _with_sigstore(requirement: RequireSigstore) -> Verifier:
    signing = import_library()
    path = next(iter(requirement.files), None)
    subject = f"{_OPTION}, " + (f"trust_config '{path}'" if path else "Sigstore's public instance")
    expected = "a trust configuration: a file, or the network to fetch it"
    with _usable(subject, expected), _as_file(b"" if path is None else _read(path)) as copy:
        config = signing.verifying.Config().use_sigstore_verifier(
            identity=requirement.identity,
            oidc_issuer=requirement.identity_provider,
            trust_config=path and copy,
        )
    name = f"sigstore {requirement.identity} ({requirement.identity_provider})"
    return Verifier(
        name, lambda data: _verified(config, _bundle(data, sigstore=True), lambda _: name)
    )


def _any_of(verifiers: Sequence[Verifier]) -> Verifier:
    def check(data: bytes) -> Verified:
        reasons = []
        for one in verifiers:
            try:
                return one.check(data)
            except NotVerifiedError as error:
                reasons.append(str(error))
        raise NotVerifiedError(reasons[0] if len(reasons) == 1 else summarize_faults(reasons))

    return Verifier(" or ".join(one.accepts for one in verifiers), check)


def _bundle(data: bytes, *, sigstore: bool = False) -> Any:
    """The signature as the library reads it, of the very bytes given."""
    from model_signing._signing import sign_sigstore, sign_sigstore_pb

    kind = sign_sigstore.Signature if sigstore else sign_sigstore_pb.Signature
    try:
        with _as_file(data) as copy:
            return kind.read(copy)
    except Exception as error:
        raise NotVerifiedError(f"no signature that can be read: {_told(error)}") from error


def _verified(config: Any, bundle: Any, signer: Callable[[Any], str]) -> Verified:
    try:
        manifest = config._verifier.verify(bundle)
        signed_by = signer(bundle)
        found = manifest.resource_descriptors()
        digests = {f.identifier: (f.digest.algorithm, f.digest.digest_hex) for f in found}
    except NotVerifiedError:
        raise
    except Exception as error:  # whatever it was: the signature has not been verified
        raise NotVerifiedError(f"a signature that does not verify: {_told(error)}") from error
    return Verified(signed_by, manifest.serialization_type["method"] == "files", digests)


def _names(certificate: Certificate) -> list[str]:
    from cryptography import x509

    common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    names = [str(attribute.value) for attribute in common]
    try:
        extensions = certificate.extensions
        others = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return names
    textual = (x509.DNSName, x509.RFC822Name, x509.UniformResourceIdentifier)
    return names + [other.value for other in others if isinstance(other, textual)]


def import_library() -> Any:
    """The package ``model_signing``, with its public modules.

    Raises:
        ConfigError: It is not installed, or does not import.
    """
    try:
        import model_signing
    except ImportError as error:
        raise ConfigError(
            "signatures",
            expected="the package model-signing",
            got=error,
            fix="Install this project with its extra: pip install '.[signing]' in a clone.",
        ) from error
    return model_signing


@contextmanager
def _usable(subject: str, expected: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ConfigError(
            subject,
            expected=expected,
            got=_told(error),
            fix="Check the file, its permissions and its kind; see docs/signing.md.",
        ) from error


def _read(path: Path) -> bytes:
    """A file that an operator named; one that is a FIFO by mistake is not waited for."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(_MOST_BYTES)


@contextmanager
def _as_file(data: bytes) -> Iterator[Path]:
    """The library takes paths; what was read once must not be read again by name."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        yield Path(file.name)


def _told(error: Exception) -> str:
    said = str(error).strip(" .\n")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
