"""Who may sign, and how: keys, certificates, Sigstore, other tools."""

import json
import os
import subprocess
import sys
from pathlib import Path

import live
import pytest
import signers
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from signers import SIGNATURE, checked, flip, prepared, refused

from enchtable_vllm.errors import ConfigError, EnchTableError, MismatchError
from enchtable_vllm.signing.sign import CertificateSigner, KeySigner, sign_vector
from enchtable_vllm.vector import SafetyVector


def test_several_keys_while_they_are_rotated(root, keys):
    both = {"method": "key", "public_key": [str(keys[k].public) for k in ("theirs", "ours")]}
    first = prepared(root, both).signed_by
    keys["theirs"].sign(root.path / "sv")
    assert prepared(root, both).signed_by not in (None, first)
    keys["ours"].sign(root.path / "sv")
    assert prepared(root, both).signed_by == first


@pytest.mark.parametrize("curve", [ec.SECP384R1, ec.SECP521R1])
def test_other_curves_and_a_password(root, tmp_path, curve):
    key = signers.Key.make(tmp_path, "k", curve, b"correct horse")
    with pytest.raises(ConfigError, match="private key"):
        key.sign(root.path / "sv", b"wrong")
    with pytest.raises(ConfigError, match="private key"):
        key.sign(root.path / "sv")
    key.sign(root.path / "sv", b"correct horse")
    assert prepared(root, key.required).signed_by


def test_keys_that_cannot_be_used(root, keys, tmp_path):
    def required(path):
        return {"method": "key", "public_key": str(path)}

    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    others = [
        signers.Key.of(rsa.generate_private_key(65537, 2048), tmp_path, "rsa"),
        signers.Key.of(ed25519.Ed25519PrivateKey.generate(), tmp_path, "ed"),
        signers.Key.make(tmp_path, "k1", ec.SECP256K1),
    ]
    unusable = [
        tmp_path / "none",
        tmp_path / "empty",
        tmp_path / "fifo",
        tmp_path,
        keys["ours"].private,
    ]
    for path in (*unusable, *(key.public for key in others)):
        with pytest.raises(ConfigError, match=r"public key '.*': expected a PEM file"):
            prepared(root, required(path))
    for path in (tmp_path / "none", keys["ours"].public, *(key.private for key in others)):
        before = (root.path / "sv" / SIGNATURE).read_bytes()
        with pytest.raises(ConfigError, match="signing: expected a private key"):
            sign_vector(SafetyVector.open(root.path / "sv"), KeySigner(path))
        assert (root.path / "sv" / SIGNATURE).read_bytes() == before


def test_certificates(root, keys, tmp_path):
    ours, theirs = (signers.Authority.make(tmp_path, name) for name in ("ours", "theirs"))
    release = ours.vouch_for(tmp_path, "release", "release@example.org")
    intruder = theirs.vouch_for(tmp_path, "release-too", "release@example.org")

    def sign(signer):
        sign_vector(SafetyVector.open(root.path / "sv"), signer)

    sign(release)
    for identity in ("release", "release@example.org"):
        found = prepared(root, ours.requires(identity))
        assert found.signed_by.startswith(f"certificate {identity} (sha256:")
    refused(lambda: prepared(root, ours.requires("somebody")), "the certificate of ['release'")
    refused(lambda: prepared(root, theirs.requires("release")), "does not verify")
    refused(lambda: prepared(root, keys["ours"].required))  # another method altogether
    sign(intruder)
    refused(lambda: prepared(root, ours.requires("release@example.org")), "does not verify")
    keys["ours"].sign(root.path / "sv")
    refused(lambda: prepared(root, ours.requires("release")))
    with pytest.raises(ConfigError, match="does not match"):
        sign(CertificateSigner(keys["ours"].private, release.certificate, release.chain))
    with pytest.raises(ConfigError, match=r"certificates '.*none'"):
        prepared(root, ours.requires("release") | {"certificate_chain": str(tmp_path / "none")})


@pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")  # the library's
def test_a_certificate_that_is_not_for_signing(root, tmp_path):
    authority = signers.Authority.make(tmp_path, "ours")
    signer = authority.vouch_for(tmp_path, "release", "release@example.org", signs=False)
    sign_vector(SafetyVector.open(root.path / "sv"), signer)
    refused(lambda: prepared(root, authority.requires("release")), "cannot be used for signing")


def test_what_is_damaged_is_not_signed(root, keys):
    vector = root.path / "sv"
    before = (vector / SIGNATURE).read_bytes()
    plan = json.loads(root.plan("sv").read_text())
    plan["safety_vector"]["fingerprint"] = "blake3:" + "0" * 64
    root.plan("sv").write_text(json.dumps(plan))
    with pytest.raises(MismatchError):
        keys["ours"].sign(vector)
    live.add_plan(root, "sv")
    flip(vector / "safety_vector.safetensors", -1)
    with pytest.raises(EnchTableError, match="content"):
        keys["ours"].sign(vector)
    assert (vector / SIGNATURE).read_bytes() == before
    assert not [p for p in vector.iterdir() if p.name.startswith(".")]


def test_other_tools_verify_it_and_sign(root, keys):
    """The format is Model Signing's own: its command verifies ours, and we verify its own."""
    vector = root.path / "sv"
    tool = [sys.executable, "-m", "model_signing"]
    options = ["--signature", str(vector / SIGNATURE)]
    public = ["--public_key", str(keys["ours"].public)]
    private = ["--private_key", str(keys["ours"].private)]
    subprocess.run([*tool, "verify", "key", str(vector), *options, *public], check=True)
    (vector / SIGNATURE).unlink()
    subprocess.run([*tool, "sign", "key", str(vector), *options, *private], check=True)
    assert prepared(root, keys["ours"].required).signed_by
    assert checked(root, keys["ours"].required) == 6


def trust_config(folder):
    """The public Sigstore's, as the package brings it: nothing is fetched."""
    import sigstore

    store = Path(sigstore.__file__).parent / "_store" / "https%3A%2F%2Ftuf-repo-cdn.sigstore.dev"
    path = folder / "trust.json"
    path.write_text(
        json.dumps(
            {
                "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
                "trustedRoot": json.loads((store / "trusted_root.json").read_text()),
                "signingConfig": json.loads((store / "signing_config.v0.2.json").read_text()),
            }
        )
    )
    return str(path)


def test_sigstore_is_asked_without_the_network(root, keys, tmp_path):
    """With a trust configuration. A real bundle needs an identity: none is kept here."""
    keys["ours"].sign(root.path / "sv")
    required = {
        "method": "sigstore",
        "identity": "release@example.org",
        "identity_provider": "https://accounts.example.org",
        "trust_config": trust_config(tmp_path),
    }
    refused(lambda: prepared(root, required), "release@example.org")
    with pytest.raises(ConfigError, match="trust_config"):
        prepared(root, required | {"trust_config": str(tmp_path / "none")})
