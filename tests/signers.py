"""People who sign vectors: keys and certificates, made anew for each run of the tests."""

from __future__ import annotations

import base64
import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import live
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec

from enchtable_vllm.checkpoint import Location, locate
from enchtable_vllm.errors import SignatureError
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.serving.choice import choose_at_start
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import open_task, prepare
from enchtable_vllm.signing import check_folder, parse_requirement, read_signature
from enchtable_vllm.signing.sign import CertificateSigner, KeySigner, sign_vector
from enchtable_vllm.vector import SafetyVector, build_vector

SIGNATURE = "safety_vector.sig"

_NOW = datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Key:
    """A key pair in two files."""

    private: Path
    public: Path

    @classmethod
    def make(cls, folder: Path, name: str, curve=ec.SECP256R1, password=None) -> Key:
        return cls.of(ec.generate_private_key(curve()), folder, name, password)

    @classmethod
    def of(cls, key, folder: Path, name: str, password=None) -> Key:
        folder.mkdir(parents=True, exist_ok=True)
        pair = cls(folder / f"{name}.pem", folder / f"{name}.pub")
        locked = s.BestAvailableEncryption(password) if password else s.NoEncryption()
        pair.private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, locked))
        pair.public.write_bytes(
            key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        )
        return pair

    @property
    def required(self) -> dict[str, object]:
        return {"method": "key", "public_key": str(self.public)}

    def sign(self, vector: Path, password=None):
        return sign_vector(SafetyVector.open(vector), KeySigner(self.private, password))


@dataclass(frozen=True)
class Authority:
    """A certificate authority, and what it vouches for."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    file: Path

    @classmethod
    def make(cls, folder: Path, name: str) -> Authority:
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = _name(name)
        certificate = (
            _certificate(issuer, issuer, key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .sign(key, hashes.SHA256())
        )
        file = folder / f"{name}.crt"
        file.write_bytes(certificate.public_bytes(s.Encoding.PEM))
        return cls(key, certificate, file)

    def vouch_for(
        self, folder: Path, name: str, email: str, *, signs: bool = True
    ) -> CertificateSigner:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _certificate(_name(name), self.certificate.subject, key)
            .add_extension(_usage(signs=signs), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(email)]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        file = folder / f"{name}.crt"
        file.write_bytes(certificate.public_bytes(s.Encoding.PEM))
        return CertificateSigner(Key.of(key, folder, name).private, file, [self.file])

    def requires(self, identity: str) -> dict[str, object]:
        chain = [str(self.file)]
        return {"method": "certificate", "certificate_chain": chain, "identity": identity}


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _certificate(subject, issuer, key) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    day = datetime.timedelta(days=1)
    return builder.not_valid_before(_NOW - day).not_valid_after(_NOW + day)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=not signs, crl_sign=not signs,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def planned_vector(family, folder: Path) -> live.Root:
    """A root with one vector, ``sv``, and its plan."""
    root = live.Root(folder, family, live.sampled_fingerprint(live.Checkpoint(family.task)))
    build_vector(locate(family.aligned), locate(family.surrogate), folder / "sv")
    live.add_plan(root, "sv")
    return root


def statement_of(vector: Path) -> dict[str, object]:
    """What a vector's signature says, unverified."""
    bundle = json.loads((vector / SIGNATURE).read_text())
    found: dict[str, object] = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return found


def prepared(root, required, **start):
    """As a server does at its start."""
    config = LoaderConfig.parse(
        {"vector_root": str(root.path), "safety_vector": "sv", "require_signature": required}
        | start
    )
    task = open_task(config, str(root.family.task), None, None)
    choice = choose_at_start(config, task)
    return prepare(choice.config, task, device="cpu")


def merged(found, folder):
    """All of it, so that every byte that a server would use is used."""
    return merge_checkpoint(found.task.location, found.vector, found.resolved, folder)


def checked(root, required):
    """As ``vector verify --require-signature`` does."""
    vector = root.path / "sv"
    signature = read_signature(Location(vector), parse_requirement(json.dumps(required)))
    return check_folder(signature, vector)


def refused(call, *said):
    with pytest.raises(SignatureError) as raised:
        call()
    text = str(raised.value)
    assert text.startswith(("safety vector '", "merge plan '"))
    assert ": expected " in text
    assert ", got " in text
    for part in said:
        assert part in text, text


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
