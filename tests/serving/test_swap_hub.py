"""Vectors out of the Hub's cache: only allowed repositories, only at the pinned commit."""

import hashlib
import shutil

import live
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = COMMIT[::-1]


def publish(vector, hub, repository, commit=COMMIT):
    """Put a folder into a cache as a download does: files that link to blobs."""
    cached = hub / f"models--{repository.replace('/', '--')}"
    for path in sorted(vector.rglob("*")):
        if path.is_file():
            blob = cached / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            link = cached / "snapshots" / commit / path.relative_to(vector)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    return cached / "snapshots" / commit


@pytest.fixture(scope="module")
def hub(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    publish(root.path / "sv-b", folder, "org/good")
    publish(root.path / "sv-b", folder, "org/good", OTHER_COMMIT)
    publish(root.path / "sv-b", folder, "org/unlisted")
    publish(root.path / "sv-flipped", folder, "org/flipped")
    publish(root.path / "sv-unplanned", folder, "org/unplanned")
    out = publish(root.path / "sv-b", folder, "org/out") / "safety_vector.safetensors"
    out.unlink()
    out.symlink_to(root.path / "sv-b" / "safety_vector.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(root, hub, tmp_path_factory):
    allowed = [f"org/{name}@{COMMIT}" for name in ("good", "flipped", "unplanned", "out", "absent")]
    variables = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("log") / "log"
    start = {"allowed_repositories": allowed}
    with live.Live(root, log, "--enforce-eager", start=start, variables=variables) as server:
        yield server


@pytest.mark.supports("swapping in vectors of pinned Hub repositories")
def test_a_repository_at_its_commit_is_served_as_its_files_are(server):
    server.swapped("sv-b")
    expected = server.weights()
    server.swapped("sv-a")
    before = server.weights()
    answer = server.swapped(f"org/good@{COMMIT}")
    assert server.weights() == expected != before
    assert answer["active"]["safety_vector"] == f"org/good@{COMMIT}"
    assert server.rollback()[1]["to"] == "sv-a"
    assert server.weights() == before
    listed = {entry["name"] for entry in server.get("/v1/enchtable/vectors")[1]["vectors"]}
    assert f"org/good@{COMMIT}" in listed


def test_persisted_it_is_what_the_next_start_serves(server, root, hub, tmp_path):
    server.swapped(f"org/good@{COMMIT}", persist=True)
    expected = server.weights()
    start = {"safety_vector": "@current", "allowed_repositories": [f"org/good@{COMMIT}"]}
    variables = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    arguments = ("--enforce-eager",)
    with live.Live(root, tmp_path / "log", *arguments, start=start, variables=variables) as later:
        assert later.weights() == expected
        assert later.status()["active"]["safety_vector"] == f"org/good@{COMMIT}"
    server.rollback()


REFUSED = {
    f"org/unlisted@{COMMIT}": (404, "unknown_vector"),
    f"org/good@{OTHER_COMMIT}": (404, "unknown_vector"),
    "org/good": (404, "unknown_vector"),
    "org/good@main": (404, "unknown_vector"),
    f"org/flipped@{COMMIT}": (422, "refused"),
    f"org/unplanned@{COMMIT}": (422, "no_plan"),
    f"org/out@{COMMIT}": (422, "refused"),
    f"org/absent@{COMMIT}": (422, "refused"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(server, name):
    before = server.status()
    answered, document = server.swap(name)
    assert (answered, document["error"]["code"]) == REFUSED[name], document
    after = server.status()
    assert [after[k] for k in ("active", "epoch")] == [before[k] for k in ("active", "epoch")]
