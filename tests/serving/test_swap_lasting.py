"""A swap that is to last: what restarted and scaled-out servers load."""

import json
import os
import signal
import time

import live
import pytest
from prometheus import ours, samples


def differs(server):
    """The metric that an alert looks at, as a scrape has it; nobody asks for the status."""
    return samples(ours(server.http.get("/metrics").text))["enchtable_desired_differs"]


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
        assert server.status()["as_desired"] is True
        server.swapped("sv-b", beta=0.7)  # the root names the plan's own
        assert (server.status()["as_desired"], current(root)["beta"]) == (False, None)
        server.swapped("sv-b")
        assert server.status()["as_desired"] is True
        server.swapped("sv-a", persist=True)
        assert server.rollback()[1]["persisted"] is True  # goes back to what was written before
        assert (current(root)["safety_vector"], current(root)["version"]) == ("sv-b", 3)
        server.swapped("sv-a", beta=0.7, persist=True)
        assert (current(root)["safety_vector"], current(root)["beta"]) == ("sv-a", 0.7)
        status = server.status()
        assert (status["as_desired"], status["desired"]["beta"]) == (True, 0.7)
        assert differs(server) == 0
        wanted, version = server.weights(), status["weight_version"]
        assert wanted != first
        os.killpg(server.process_group, signal.SIGKILL)
        server._process.wait()
    start = {"safety_vector": "@current"}
    with live.Live(root, tmp_path / "again", eager, start=start) as server:
        assert server.weights() == wanted
        assert server.status()["weight_version"] == version
        assert differs(server) == 0
        server.swapped("sv-b")  # without 'persist': this server alone, and it shows
        assert differs(server) == 1
        status = server.status()
        assert (status["as_desired"], status["active"]["safety_vector"]) == (False, "sv-b")
        assert status["ready"]
        assert current(root)["safety_vector"] == "sv-a"
        server.swapped("@current")
        assert differs(server) == 0
        assert server.weights() == wanted
        # Somebody else's roll-out changes the root; this server's own swap is not what it undoes.
        server.swapped("sv-b", persist=True)
        assert differs(server) == 0
        (root.path / "current.json").write_text(
            json.dumps({"version": 9, "safety_vector": "sv-ffn", "updated": ""})
        )
        deadline = time.monotonic() + 30
        while differs(server) == 0:  # each server looks for itself
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert server.rollback()[1]["persisted"] is False
        assert current(root)["safety_vector"] == "sv-ffn"
        assert server.status()["as_desired"] is False
    with live.Live(root, tmp_path / "later", eager, start=start) as server:
        assert server.status()["active"]["safety_vector"] == "sv-ffn"
