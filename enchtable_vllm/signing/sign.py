"""Signing a vector's folder: what is signed has been checked, by whoever signs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enchtable_vllm.checkpoint import FileTransaction
from enchtable_vllm.errors import ConfigError, SignatureError
from enchtable_vllm.plan import ResolvedPlan, open_masks, read_plan, resolve_plan
from enchtable_vllm.progress import Progress, silent
from enchtable_vllm.signing.folder import covered_files
from enchtable_vllm.signing.library import import_library, sign_files
from enchtable_vllm.signing.signature import SIGNATURE_FILE, is_plan
from enchtable_vllm.vector import SafetyVector
from enchtable_vllm.vector.factor_files import verify_factors


@dataclass(frozen=True)
class KeySigner:
    """A private key in a PEM file: ECDSA on P-256, P-384 or P-521."""

    private_key: Path
    password: bytes | None = None

    def configure(self, config: Any) -> None:
        """Load it."""
        config.use_elliptic_key_signer(private_key=self.private_key, password=self.password)


@dataclass(frozen=True)
class CertificateSigner:
    """A private key, the certificate of its public half, and those that vouch for that."""

    private_key: Path
    certificate: Path
    chain: Sequence[Path]

    def configure(self, config: Any) -> None:
        """Load all of it; a key of another certificate is refused."""
        config.use_certificate_signer(
            private_key=self.private_key,
            signing_certificate=self.certificate,
            certificate_chain=self.chain,
        )


@dataclass(frozen=True)
class SigstoreSigner:
    """An OpenID Connect identity: of a token, of the CI job that this runs in, or of a person.

    Attributes:
        identity_token: If there is one; else the CI's own is looked for, and then a browser opened.
        trust_config: File with the trust configuration of a Sigstore that is not the public one.
    """

    identity_token: str | None = None
    trust_config: Path | None = None

    def configure(self, config: Any) -> None:
        """Find the services; this needs the network."""
        config.use_sigstore_signer(
            identity_token=self.identity_token,
            use_ambient_credentials=True,
            trust_config=self.trust_config,
        )


@dataclass(frozen=True)
class Signed:
    """What was signed.

    Attributes:
        files: Every file that the signature covers, by its path inside the folder.
        plans: The plans among them.
    """

    files: list[str]
    plans: dict[str, ResolvedPlan]


def sign_vector(
    vector: SafetyVector,
    signer: KeySigner | CertificateSigner | SigstoreSigner,
    *,
    progress: Progress = silent,
) -> Signed:
    """Check a vector and its plans to the last byte, and sign its folder.

    Args:
        vector: In a folder of its own; a signature that is there is replaced.
        signer: Whose signature.
        progress: Called with each tensor's name, how many are checked, and how many there are.

    Raises:
        ConfigError: The folder is a Hub cache's, or key, certificate or identity cannot be used.
        SignatureError: The folder holds links, or what is no file; or a plan of another vector.
        EnchTableError: The vector or a plan is damaged.
    """
    if vector.location.repo_id is not None:
        raise ConfigError(
            vector.what,
            expected="a folder of your own",
            got="one of the Hub's cache",
            fix="Download it with 'hf download --local-dir', sign that, and upload it again.",
        )
    config, folder = _configured(signer), vector.location.path
    files = covered_files(folder, vector.what)
    plans = {name: _checked_plan(folder / name, vector) for name in files if is_plan(name)}
    for done, name in enumerate(vector.tensors, 1):
        vector.dense(name)
        progress(name, done, len(vector.tensors))
    verify_factors(vector)
    with FileTransaction(folder / SIGNATURE_FILE) as partial:
        partial.write_bytes(_signature(config, folder, files))
    return Signed(files, plans)


def _configured(signer: KeySigner | CertificateSigner | SigstoreSigner) -> Any:
    config = import_library().signing.Config()
    try:
        signer.configure(config)
    except Exception as error:  # of many libraries: files, PEM, ASN.1, the network
        raise ConfigError(
            "signing",
            expected="a private key that is ECDSA on P-256, P-384 or P-521, with the certificate "
            "that belongs to it if there is one, or an identity for Sigstore",
            got=f"{type(error).__name__}: {error}",
            fix="Check the files and the password; docs/signing.md says how to make them.",
        ) from error
    return config


def _signature(config: Any, folder: Path, files: list[str]) -> bytes:
    try:
        return sign_files(config, folder, files, SIGNATURE_FILE)
    except Exception as error:
        raise SignatureError(
            f"safety vector '{folder}'",
            expected="a signature",
            got=f"{type(error).__name__}: {error}",
            fix="Nothing was written. Check the identity and the network, and try again.",
        ) from error


def _checked_plan(path: Path, vector: SafetyVector) -> ResolvedPlan:
    plan, digest = read_plan(path)
    resolved = resolve_plan(plan, digest)
    resolved.check_vector(vector)
    masks = open_masks(plan, path)
    if masks is not None:
        for name in plan.merged:
            masks.read(name, math.prod(vector.tensors[name].shape))
    return resolved
