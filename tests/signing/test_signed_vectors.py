"""Where a signature is required: what is served, and every way to be refused."""

import base64
import json
import os
import shutil
import subprocess

import live
import model_signing
import pytest
import signers
from signers import SIGNATURE, checked, flip, merged, prepared, refused

from enchtable_vllm.checkpoint import locate
from enchtable_vllm.cli.sign import signed_by
from enchtable_vllm.errors import ConfigError, EnchTableError
from enchtable_vllm.serving.choice import choose, choose_at_start
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import open_task, prepare
from enchtable_vllm.signing import signature
from enchtable_vllm.vector import build_vector


def test_what_is_signed_is_served_and_said(root, keys, tmp_path):
    found = prepared(root, keys["ours"].required)
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", keys["ours"].public, "-outform", "DER"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    digest = subprocess.run(["sha256sum"], input=der, check=True, capture_output=True).stdout
    assert found.signed_by == f"key sha256:{digest.decode().split()[0]}"
    assert merged(found, tmp_path / "merged").effects
    unsigned = prepared(root, None)
    assert unsigned.signed_by is None
    assert unsigned.resolved.digest == found.resolved.digest


def test_everything_visible_is_covered(root, keys):
    names = {p.relative_to(root.path / "sv").as_posix() for p in (root.path / "sv").rglob("*.*")}
    assert names >= {"safety_vector.json", "safety_vector.safetensors", "README.md"}
    stated = signers.statement_of(root.path / "sv")["predicate"]["resources"]
    assert {r["name"] for r in stated} == names - {SIGNATURE}
    assert checked(root, keys["ours"].required) == len(stated) == 6


COVERED = [
    "safety_vector.json", "safety_vector.safetensors", "safety_vector_factors.safetensors",
    "README.md", "plans/TASK.json", "plans/another-task.json",
]  # fmt: skip
#: What a server reads; a flipped bit elsewhere changes nothing that it does.
READ = {"safety_vector.json", "safety_vector.safetensors", "plans/TASK.json"}


def path_of(root, name):
    return root.plan("sv") if name == "plans/TASK.json" else root.path / "sv" / name


@pytest.mark.parametrize("name", COVERED)
def test_a_flipped_bit_in_each_covered_file(root, keys, tmp_path, name):
    """In a number, where JSON stays JSON, and in a tensor's last byte."""
    path = path_of(root, name)
    data = path.read_bytes()
    at = data.rindex(b"norm") + 9 if path.suffix == ".json" else len(data) - 1
    while path.suffix == ".json" and not chr(data[at]).isdigit():
        at += 1
    flip(path, at)
    refused(lambda: checked(root, keys["ours"].required), "was changed", path.name)
    if name not in READ:
        assert merged(prepared(root, keys["ours"].required), tmp_path / "merged").effects
        return
    with pytest.raises(EnchTableError) as raised:
        merged(prepared(root, keys["ours"].required), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    kinds = {"safety_vector.safetensors": "SafetyVectorError", "plans/TASK.json": "MergePlanError"}
    assert type(raised.value).__name__ == kinds.get(name, "SignatureError")


def whole_plan(root, **options):
    """A plan without fault, that agrees with itself, and that nobody signed."""
    live.add_plan(root, "sv", **options)


def replanned(root, _):
    whole_plan(root, beta=1e-9)
    return "a plan that was signed with its vector", "plans/"


def plan_added(root, _):
    root.plan("sv").unlink()
    (root.path / "sv" / "plans" / "another-task.json").unlink()
    whole_plan(root, beta=0.25)
    return ("a plan that was signed with its vector",)


def rebuilt(root, _):
    """Another vector, whole and with its own plan, under the signature of the first."""
    vector = root.path / "sv"
    kept = (vector / SIGNATURE).read_bytes()
    shutil.rmtree(vector)
    family = root.family
    build_vector(locate(family.aligned), locate(family.surrogate), vector, dtype="fp32")
    live.add_plan(root, "sv")
    (vector / SIGNATURE).write_bytes(kept)
    return "file 'safety_vector.json'", "another of this name"


def unsigned(root, _):
    (root.path / "sv" / SIGNATURE).unlink()
    return "a signature by key sha256:", "none"


def by_another(root, keys):
    keys["theirs"].sign(root.path / "sv")
    return "a signature by key sha256:", "Key mismatch"


def truncated(root, _):
    path = root.path / "sv" / SIGNATURE
    path.write_bytes(path.read_bytes()[:-40])
    return ("EOF while parsing",)


def empty(root, _):
    (root.path / "sv" / SIGNATURE).write_bytes(b"")
    return ("a signature by key sha256:",)


def no_bundle(root, _):
    (root.path / "sv" / SIGNATURE).write_text("{}")
    return "no signature that can be read", "verificationMaterial"


def forged(root, keys):
    """The right key's name on another's signature: only the mathematics tells."""
    ours = json.loads((root.path / "sv" / SIGNATURE).read_text())
    by_another(root, keys)
    theirs = json.loads((root.path / "sv" / SIGNATURE).read_text())
    theirs["verificationMaterial"] = ours["verificationMaterial"]
    (root.path / "sv" / SIGNATURE).write_text(json.dumps(theirs))
    return "does not verify", "InvalidSignature"


def edited(root, _):
    """The payload says that another manifest was signed."""
    path = root.path / "sv" / SIGNATURE
    bundle = json.loads(path.read_text())
    statement = signers.statement_of(root.path / "sv")
    statement["predicate"]["resources"][0]["digest"] = "0" * 64
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(bundle))
    return ("does not verify",)


def fifo(root, _):
    (root.path / "sv" / SIGNATURE).unlink()
    os.mkfifo(root.path / "sv" / SIGNATURE)
    return ("a FIFO",)


def by_shards(root, keys):
    """Another tool's signature, which names parts of files."""
    vector = root.path / "sv"
    (vector / SIGNATURE).unlink()
    hashing = model_signing.hashing.Config().use_shard_serialization()
    config = model_signing.signing.Config().set_hashing_config(hashing)
    config.use_elliptic_key_signer(private_key=keys["ours"].private)
    config.sign(vector, vector / SIGNATURE)
    return ("whole files",)


@pytest.mark.refuses("vectors and plans that are not signed, where `require_signature` demands it")
@pytest.mark.parametrize(
    "damage",
    [
        replanned, plan_added, rebuilt, unsigned, by_another, truncated, empty, no_bundle,
        forged, edited, fifo, by_shards,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_a_server_refuses(root, keys, damage):
    prepared(root, keys["ours"].required)
    said = damage(root, keys)
    refused(lambda: prepared(root, keys["ours"].required), *said)
    refused(lambda: checked(root, keys["ours"].required))


def test_the_signature_of_another_folder(root, family, keys, tmp_path):
    other = signers.planned_vector(family, tmp_path / "other")
    whole_plan(other, beta=0.9)
    keys["ours"].sign(other.path / "sv")
    shutil.copyfile(other.path / "sv" / SIGNATURE, root.path / "sv" / SIGNATURE)
    refused(lambda: prepared(root, keys["ours"].required))


def test_a_plan_that_was_removed(root, keys):
    """Nothing is there to be served; and whoever checks the folder is told what is missing."""
    name = root.plan("sv").name
    root.plan("sv").unlink()
    refused(lambda: checked(root, keys["ours"].required), f"'plans/{name}' is missing")
    with pytest.raises(EnchTableError, match="a plan for task model"):
        prepared(root, keys["ours"].required)


def test_a_file_that_was_added(root, keys):
    (root.path / "sv" / "plans" / "more.json").write_text("{}")
    refused(lambda: checked(root, keys["ours"].required), "'plans/more.json' was added")
    (root.path / "sv" / "plans" / "more.json").unlink()
    (root.path / "sv" / ".git").mkdir()  # hidden: never read as a part of a vector
    (root.path / "sv" / ".git" / "config").write_text("")
    assert checked(root, keys["ours"].required) == 6


@pytest.mark.parametrize("name", ["README.md", "plans"])
def test_links_are_not_signed_and_not_verified(root, keys, tmp_path, name):
    target = shutil.move(root.path / "sv" / name, tmp_path / "elsewhere")
    (root.path / "sv" / name).symlink_to(target)
    refused(lambda: checked(root, keys["ours"].required), f"'{name}' is a link")
    refused(lambda: keys["ours"].sign(root.path / "sv"), f"'{name}' is a link")


def test_a_plan_is_known_by_its_bytes_wherever_it_lies(root, keys, tmp_path):
    """A model's own folder may carry it; the same name inside the vector is not asked for."""
    elsewhere = shutil.copyfile(root.plan("sv"), tmp_path / "p.json")
    prepared(root, keys["ours"].required, merge_plan=str(elsewhere))
    plan = json.loads(elsewhere.read_text())
    elsewhere.write_text(json.dumps(plan))  # the same plan, in other bytes
    refused(
        lambda: prepared(root, keys["ours"].required, merge_plan=str(elsewhere)),
        f"merge plan '{elsewhere}'",
    )


def test_a_file_that_calls_itself_a_plan_is_none(root, keys):
    """Only what lies under plans/ was looked at by whoever signed."""
    plan = root.plan("sv")
    shutil.move(plan, root.path / "sv" / "report.json")
    shutil.rmtree(root.path / "sv" / "plans")
    keys["ours"].sign(root.path / "sv")
    refused(
        lambda: prepared(
            root, keys["ours"].required, merge_plan=str(root.path / "sv" / "report.json")
        )
    )


def test_replaced_after_verification(root, keys, tmp_path):
    """What is merged is what was verified, whoever writes to the folder between the two."""
    found = prepared(root, keys["ours"].required)
    expected = merged(found, tmp_path / "expected")
    found = prepared(root, keys["ours"].required)
    shutil.rmtree(root.path / "sv")  # the files that were opened are still those
    rebuilt_vector = root.path / "sv"
    build_vector(
        locate(root.family.aligned), locate(root.family.surrogate), rebuilt_vector, dtype="fp32"
    )
    assert merged(found, tmp_path / "merged").merged_digest == expected.merged_digest
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (
        tmp_path / "expected" / "model.safetensors"
    ).read_bytes()


def test_written_to_after_verification(root, keys, tmp_path):
    found = prepared(root, keys["ours"].required)
    flip(root.path / "sv" / "safety_vector.safetensors", -1)
    with pytest.raises(EnchTableError):
        merged(found, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_between_the_signature_and_the_manifest(root, keys, monkeypatch):
    """A folder that is exchanged for another whole one after its signature was verified."""
    real = signature.read_signature

    def exchanging(*arguments):
        verified = real(*arguments)
        rebuilt(root, keys)
        return verified

    monkeypatch.setattr(signature, "read_signature", exchanging)
    refused(lambda: prepared(root, keys["ours"].required), "safety_vector.json")


def test_a_repository_that_is_signed(signed_root, keys, tmp_path, monkeypatch):
    """In a Hub cache, whose files are links to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--org--sv"
    snapshot = home / "snapshots" / commit
    (home / "blobs").mkdir(parents=True)
    vector = signed_root.path / "sv"
    for number, name in enumerate(p for p in vector.rglob("*") if p.is_file()):
        blob = shutil.copyfile(name, home / "blobs" / str(number))
        link = snapshot / name.relative_to(vector)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    asked = f"org/sv@{commit}"
    config = LoaderConfig.parse(
        {"allowed_repositories": [asked], "require_signature": keys["ours"].required}
    )
    task = open_task(config, str(signed_root.family.task), None, str(tmp_path))

    def found():
        return prepare(choose(config, asked, None, task).config, task, device="cpu")

    assert found().signed_by
    signed, count = signed_by(asked, str(keys["ours"].public))
    assert (signed, count) == (found().signed_by, 6)
    link = snapshot / signed_root.plan("sv").relative_to(vector)
    link.resolve().write_text(link.read_text() + "\n")
    refused(found, "merge plan")
    refused(lambda: signed_by(asked, str(keys["ours"].public)), "was changed")
    with pytest.raises(ConfigError, match="a folder of your own"):
        keys["ours"].sign(snapshot)


def test_what_nobody_can_have_signed(root, keys):
    """No vector, and a β so small that it is none: not by name, and not by current.json."""
    config = LoaderConfig.parse(
        {
            "vector_root": str(root.path),
            "safety_vector": "@current",
            "require_signature": keys["ours"].required,
        }
    )
    task = open_task(config, str(root.family.task), None, None)
    assert choose(config, "sv", None, task).config.beta is None
    assert choose(config, "sv", 0.5, task).config.beta is None  # the plan's own, said aloud
    refused(lambda: choose(config, "@none", None, task), "no vector")
    refused(lambda: choose(config, "sv", 1e-9, task), "a plan with beta 0.5")
    current = {"version": 1, "safety_vector": "@none", "updated": ""}
    (root.path / "current.json").write_text(json.dumps(current))
    refused(lambda: choose_at_start(config, task), "no vector")
    refused(lambda: choose(config, "@current", None, task), "no vector")
    (root.path / "current.json").write_text(
        json.dumps(current | {"safety_vector": "sv", "beta": 1e-9})
    )
    refused(lambda: choose_at_start(config, task), "a plan with beta 0.5")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"base_model": "b", "safety_vector": "v"}, "excludes 'base_model'"),
        ({"safety_vector": "@none"}, "excludes '@none'"),
        ({"require_signature": {"method": "pgp"}}, "require_signature"),
        ({"require_signature": {"method": "key"}}, "public_key"),
        ({"require_signature": {"method": "key", "public_key": []}}, "public_key"),
        ({"require_signature": {"method": "key", "public_key": "k", "x": 1}}, "x"),
        ({"require_signature": {"method": "certificate", "identity": "i"}}, "certificate_chain"),
        (
            {"require_signature": {"method": "certificate", "certificate_chain": "c"}},
            "identity",
        ),
        ({"require_signature": {"method": "sigstore", "identity": "i"}}, "identity_provider"),
        ({"require_signature": True}, "require_signature"),
        ({"require_signature": "signer.pub"}, "require_signature"),
    ],
)
def test_configurations_that_are_refused(keys, said):
    required = {"require_signature": {"method": "key", "public_key": "k"}}
    with pytest.raises(ConfigError, match=said):
        LoaderConfig.parse(required | keys)
