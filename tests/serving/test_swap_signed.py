"""A server that demands signatures: it is started once, and talked into nothing."""

import json
import shutil

import live
import pytest
import signers

FLIPPED = -1


@pytest.fixture(scope="module")
def root(family, keys, tmp_path_factory):
    """``sv-a`` and ``sv-q`` are signed by us, ``sv-ffn`` by others, ``sv-b`` by nobody."""
    root = live.make_root(family, tmp_path_factory.mktemp("swap"))
    for name, key in {"sv-a": "ours", "sv-q": "ours", "sv-ffn": "theirs"}.items():
        keys[key].sign(root.path / name)
    return root


@pytest.fixture(scope="module")
def trusted(keys, tmp_path_factory):
    """The public key that the server reads."""
    return shutil.copyfile(keys["ours"].public, tmp_path_factory.mktemp("trusted") / "signer.pub")


@pytest.fixture(scope="module")
def server(root, trusted, tmp_path_factory):
    start = {"require_signature": {"method": "key", "public_key": str(trusted)}}
    log = tmp_path_factory.mktemp("log") / "log"
    with live.Live(root, log, "--enforce-eager", start=start) as server:
        yield server


def refused(answer, kind, *said):
    code, document = answer
    assert (code, document["error"]["code"]) == (422, "refused"), document
    assert document["error"]["kind"] == kind
    for part in said:
        assert part in document["error"]["message"], document


def served(server):
    status = server.status()
    kept = {key: status[key] for key in ("active", "epoch", "weight_version", "ready")}
    return kept, server.weights(), server.tokens()


@pytest.mark.supports("signed vectors (`require_signature`): loading, swapping, rolling back")
def test_only_what_is_signed_is_served(server, root, keys, trusted):
    # Loaded, and said by whom it is signed.
    first, weights, tokens = served(server)
    ours = first["active"]["signed_by"]
    assert ours.startswith("key sha256:")
    assert server.lines(f"safety vector 'sv-a' is signed: {ours}")

    # Nothing else is swapped in, and nothing is changed by asking.
    (root.path / "current.json").write_text(
        json.dumps({"version": 1, "safety_vector": "@none", "updated": ""})
    )
    for name, options, said in (
        ("sv-b", {}, f"expected a signature by {ours}, got none"),
        ("sv-ffn", {}, "Key mismatch"),
        ("sv-q", {"beta": 1e-9}, "a plan with beta 0.5"),
        ("@none", {}, "no vector"),
        ("@current", {}, "no vector"),
        ("sv-b", {"dry_run": True}, "got none"),
    ):
        refused(server.swap(name, **options), "SignatureError", said)
        assert served(server) == (first, weights, tokens), name
    told = {v["name"]: v for v in server.get("/v1/enchtable/vectors")[1]["vectors"]}
    assert told["sv-q"]["signed_by"] == ours
    assert told["sv-b"]["signed_by"] is None
    assert "a signature by" in told["sv-b"]["fault"]

    # What is signed is.
    server.swapped("sv-q", beta=0.5)  # which is its plan's own
    second = served(server)
    assert second[0]["active"]["signed_by"] == ours
    assert second[1] != weights
    shown = server.http.get("/metrics").text
    assert "\nenchtable_signed 1.0\n" in shown
    assert '\nenchtable_verification_failures_total{kind="SignatureError"} 6.0\n' in shown

    # No way back to what was tampered with since: a plan without fault that merges next to
    # nothing, a vector's bit, the signature itself.
    vector, plan = root.path / "sv-a", root.plan("sv-a")
    kept = shutil.copytree(vector, root.path.parent / "kept")
    live.add_plan(root, "sv-a", beta=1e-9)
    refused(server.rollback(), "SignatureError", "a plan that was signed with its vector")
    assert served(server) == second
    shutil.copyfile(kept / "plans" / plan.name, plan)
    signers.flip(vector / "safety_vector.safetensors", FLIPPED)
    refused(server.rollback(), "SafetyVectorError", "expected content blake3:")
    assert served(server) == second
    shutil.copyfile(kept / "safety_vector.safetensors", vector / "safety_vector.safetensors")
    (vector / signers.SIGNATURE).unlink()
    refused(server.rollback(), "SignatureError", "got none")
    assert served(server) == second
    shutil.copyfile(kept / signers.SIGNATURE, vector / signers.SIGNATURE)
    assert server.rollback()[1]["outcome"] == "rolled_back"
    assert served(server)[1:] == (weights, tokens)

    # The key is exchanged: what the old one signed can be left, and not be gone back to.
    shutil.copyfile(keys["theirs"].public, trusted)
    server.swapped("sv-ffn")
    third = served(server)
    assert third[0]["active"]["signed_by"] not in (None, ours)
    refused(server.rollback(), "SignatureError", "Key mismatch")
    assert served(server) == third
