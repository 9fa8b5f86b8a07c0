"""A swap that is to last: what restarted and scaled-out servers load."""

import json
import os
import signal
import time

import live
import pytest


@pytest.fixture(scope="module")
def root(family, tmp_path_factory):
    return live.make_root(family, tmp_path_factory.mktemp("swap"))


def current(root):
    path = root.path / "current.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.supports("swaps that last over restarts (`@current`)")
def test_swap_kill_restart_and_a_second_server(root, tmp_path):
    eager = "--enforce-eager"
    with live.Live(root, tmp_path / "first", eager) as server:
        first = server.weights()
        assert server.status()["desired"] is None
        assert server.swapped("sv-b")["persisted"] is False
        assert current(root) is None
        answer = server.swap("sv-b", persist=True)[1]  # already served: only written
        assert (answer["outcome"], answer["persisted"]) == ("unchanged", True)
        assert current(root)["safety_vector"] == "sv-b"
        server.swapped("sv-a", persist=True)
        assert server.rollback()[1]["persisted"] is True  # goes back to what was written before
        assert (current(root)["safety_vector"], current(root)["version"]) == ("sv-b", 3)
        server.swapped("sv-a", beta=0.7, persist=True)
        assert (current(root)["safety_vector"], current(root)["beta"]) == ("sv-a", 0.7)
        status = server.status()
        assert (status["as_desired"], status["desired"]["beta"]) == (True, 0.7)
        wanted, version = server.weights(), status["weight_version"]
        assert wanted != first
        os.killpg(server.process_group, signal.SIGKILL)
        server._process.wait()
    start = {"safety_vector": "@current"}
    with live.Live(root, tmp_path / "again", eager, start=start) as server:
        assert server.weights() == wanted
        assert server.status()["weight_version"] == version
        server.swapped("sv-b")  # without 'persist': this server alone, and it shows
        status = server.status()
        assert (status["as_desired"], status["active"]["safety_vector"]) == (False, "sv-b")
        assert status["ready"]
        assert current(root)["safety_vector"] == "sv-a"
        server.swapped("@current")
        assert server.weights() == wanted
        # Somebody else's roll-out changes the root; this server's own swap is not what it undoes.
        server.swapped("sv-b", persist=True)
        (root.path / "current.json").write_text(
            json.dumps({"version": 9, "safety_vector": "sv-ffn", "updated": ""})
        )
        assert server.rollback()[1]["persisted"] is False
        assert current(root)["safety_vector"] == "sv-ffn"
        deadline = time.monotonic() + 30
        while server.status()["as_desired"] is not False:
            assert time.monotonic() < deadline
    with live.Live(root, tmp_path / "later", eager, start=start) as server:
        assert server.status()["active"]["safety_vector"] == "sv-ffn"


def test_a_server_without_a_token_has_no_route_that_changes_anything(root, tmp_path):
    with live.Live(root, tmp_path / "log", "--enforce-eager", token=False) as server:
        assert server.swap("sv-b")[0] == 404
        assert server.rollback()[0] == 404
        assert server.post("/v1/enchtable/probe")[0] == 404
        assert server.status()["active"]["safety_vector"] == "sv-a"
        paths = server.http.get("/openapi.json").json()["paths"]
        assert "/v1/enchtable/swap" not in paths
        assert "/v1/enchtable/status" in paths
