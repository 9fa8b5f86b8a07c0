"""``enchtable vector sign`` and ``verify``, and what ``enchtable doctor`` says of signatures."""

import json
import shutil
import stat

import pytest
import signers
from cryptography.hazmat.primitives.asymmetric import ec
from signers import SIGNATURE, flip
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.doctor.dry_run import Question, dry_run
from enchtable_vllm.doctor.signatures import check_signatures
from enchtable_vllm.errors import ConfigError, EnchTableError, SignatureError


def run(*arguments, code=0):
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if isinstance(done.exception, EnchTableError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def test_sign_and_verify(root, keys):
    vector = root.path / "sv"
    (vector / SIGNATURE).unlink()
    with pytest.raises(SignatureError, match=f"no '{SIGNATURE}'"):
        run("vector", "verify", vector, "--require-signature", keys["ours"].public)
    said = run("vector", "sign", vector, "--private-key", keys["ours"].private)
    assert f"6 files signed: {vector / SIGNATURE}" in said
    assert f"plans/{root.plan('sv').name}"[:40] in said
    said = run("vector", "verify", vector, "--require-signature", keys["ours"].public)
    assert "6 files verified, signed: key sha256:" in said
    assert "8 tensors verified" in said
    required = json.dumps(keys["ours"].required)
    answer = json.loads(run("vector", "verify", vector, "--require-signature", required, "--json"))
    assert answer["signed_by"].startswith("key sha256:")
    assert "signed_by" not in json.loads(run("vector", "verify", vector, "--json"))
    with pytest.raises(SignatureError, match="Key mismatch"):
        run("vector", "verify", vector, "--require-signature", keys["theirs"].public)
    flip(vector / "README.md", 5)
    with pytest.raises(SignatureError, match=r"'README.md' was changed"):
        run("vector", "verify", vector, "--require-signature", keys["ours"].public)
    assert "8 tensors verified" in run("vector", "verify", vector)


def test_signing_as_json_says_what_was_signed(root, keys):
    sign = ["vector", "sign", root.path / "sv", "--private-key", keys["ours"].private, "--json"]
    answer = json.loads(run(*sign))
    plan = answer["plans"][f"plans/{root.plan('sv').name}"]
    assert plan["task_model"]["fingerprint"] == root.fingerprint
    assert plan["beta"] == 0.5
    assert len(answer["files"]) == 6
    assert SIGNATURE not in answer["files"]


def test_a_key_with_a_password_and_a_certificate(root, tmp_path):
    vector = root.path / "sv"
    key = signers.Key.make(tmp_path, "locked", ec.SECP384R1, b"correct horse")
    (tmp_path / "password").write_text("correct horse\n")
    sign = ["vector", "sign", vector, "--private-key"]
    run(*sign, key.private, "--password-file", tmp_path / "password")
    run("vector", "verify", vector, "--require-signature", key.public)
    authority = signers.Authority.make(tmp_path, "authority")
    release = authority.vouch_for(tmp_path, "release", "release@example.org")
    chain = ["--certificate", release.certificate, "--certificate-chain", authority.file]
    run(*sign, release.private_key, *chain)
    required = json.dumps(authority.requires("release@example.org"))
    assert "certificate release@example.org" in run(
        "vector", "verify", vector, "--require-signature", required
    )


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--private-key", "k", "--sigstore"],
        ["--sigstore", "--certificate", "c"],
        ["--private-key", "k", "--certificate-chain", "c"],
        ["--private-key", "k", "--trust-config", "t"],
        ["--private-key", "k", "--certificate", "c", "--password-file", "p"],
    ],
)
def test_wrong_usage(root, options):
    before = (root.path / "sv" / SIGNATURE).read_bytes()
    run("vector", "sign", root.path / "sv", *options, code=2)
    assert (root.path / "sv" / SIGNATURE).read_bytes() == before


def test_a_requirement_that_is_none(root):
    with pytest.raises(ConfigError, match="--require-signature: expected the path"):
        run("vector", "verify", root.path / "sv", "--require-signature", '{"method": "pgp"}')


def found(asked, root=None):
    return {finding.name: finding for finding in check_signatures(str(asked), root)}


def test_the_doctor_checks_the_key(keys, tmp_path):
    public = shutil.copyfile(keys["ours"].public, tmp_path / "signer.pub")
    public.chmod(0o644)
    finding = found(public)["required signature"]
    assert finding.status == "ok"
    assert finding.found.startswith("accepts key sha256:")
    public.chmod(0o644 | stat.S_IWGRP)
    finding = found(public)["required signature"]
    assert (finding.status, finding.cure.split(": ")[1]) == ("fail", f"chmod go-w '{public}'.")
    for damage in (lambda: public.write_text("none"), public.unlink):
        damage()
        assert found(public)["required signature"].status == "fail"
    assert found("{}")["required signature"].status == "fail"


def test_the_doctor_fetches_nothing(root, monkeypatch):
    """Where a server would fetch Sigstore's trust root, it is said, and no name is looked up."""

    def asked(*arguments):
        raise AssertionError(f"the network was asked for {arguments}")

    monkeypatch.setattr("socket.getaddrinfo", asked)
    public = {"method": "sigstore", "identity": "i", "identity_provider": "https://example.org"}
    (finding,) = found(json.dumps(public), root.path).values()
    assert (finding.status, "'trust_config'" in finding.cure) == ("warn", True)


def test_the_doctor_checks_every_vector_of_a_root(root, keys):
    for name in ("unsigned", "another", "edited", "replanned"):
        shutil.copytree(root.path / "sv", root.path / name)
    (root.path / "unsigned" / SIGNATURE).unlink()
    keys["theirs"].sign(root.path / "another")
    with (root.path / "edited" / "safety_vector.json").open("a") as file:
        file.write("\n")
    with (root.path / "replanned" / "plans" / root.plan("sv").name).open("a") as file:
        file.write("\n")
    told = found(keys["ours"].public, root.path)
    statuses = {name.removeprefix("signature of vector "): f.status for name, f in told.items()}
    assert statuses == {
        "required signature": "ok", "'sv'": "ok", "'unsigned'": "fail", "'another'": "fail",
        "'edited'": "fail", "'replanned'": "fail",
    }  # fmt: skip
    assert told["signature of vector 'sv'"].found.endswith("; 2 plan(s)")
    assert "merge plan" in told["signature of vector 'replanned'"].found


def test_the_dry_run_of_a_model(root, keys):
    model, vector = str(root.family.task), str(root.path / "sv")
    plan, key = str(root.plan("sv")), str(keys["ours"].public)
    question = Question(model, vector, merge_plan=plan, require_signature=key)
    finding = dry_run(question)[-1]
    assert finding.status == "ok"
    assert "; signed: key sha256:" in finding.found
    (root.path / "sv" / SIGNATURE).unlink()
    finding = dry_run(question)[-1]
    assert (finding.status, finding.cause.split(":")[0]) == ("fail", "SignatureError")
