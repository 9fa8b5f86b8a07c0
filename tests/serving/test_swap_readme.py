"""README's "Swap without a restart" and "Metrics", typed in as they stand.

Names are put for placeholders; what is added to a server is what a small machine needs.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import live
import pytest
from prometheus import samples

from enchtable_vllm.demo.server import Server, free_port

README = (Path(__file__).parents[2] / "README.md").read_text()


def typed(title):
    """The commands of a section; what is optional is left out."""
    block = re.search(rf"^### {title}\n+```\n(.*?)^```", README, re.M | re.S)[1]
    # What continues a command is indented, what is optional is in brackets.
    return re.sub(r"\s*\[[^\]]*\]", "", re.sub(r"\n +", " ", block)).splitlines()


def test_each_command_does_what_it_says(root, tmp_path):
    token = tmp_path / "token"
    token.write_text(live.TOKEN)
    token.chmod(0o600)
    exported, serve, *commands = typed("Swap without a restart")
    variables = dict(word.split("=", 1) for word in shlex.split(exported)[1:])
    variables["ENCHTABLE_ADMIN_TOKEN_FILE"] = str(token)
    names = {
        "TASK": root.family.task,
        "BASE": root.family.base,
        "ROOT": root.path,
        "FINGERPRINT": root.fingerprint.removeprefix("blake3:"),
        "OTHER": "sv-other",
        "NAME": "sv-a",
    }
    shutil.copytree(root.path / "sv-unplanned", root.path / "sv-other")

    def filled(line):
        pattern = re.compile(r"\b(" + "|".join(names) + r")\b")
        return shlex.split(pattern.sub(lambda found: str(names[found[0]]), line))

    def run(line):
        program, *arguments = filled(line.replace("FILE|dns://SERVICE:PORT", "FILE"))
        assert program == "enchtable"
        done = subprocess.run(
            [Path(sys.executable).with_name("enchtable"), *arguments],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **variables},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    arguments = [*filled(serve)[3:], *live.ARGUMENTS[2:], "--enforce-eager"]
    server = Server(
        root.family.task, arguments, tmp_path / "log", port=free_port(), variables=variables
    )
    with server:
        names["URL"] = server.url
        names["FILE"] = tmp_path / "targets"
        names["FILE"].write_text(server.url + "\n")
        plan, status, swap, rollback, rollout = commands

        def served():
            return json.loads(run(status + " --json"))["active"]["safety_vector"]

        def reported():
            """By the report of the other vector's plan: what it warns of, and the metrics."""
            path = root.path / "sv-other" / "plans" / f"{names['FINGERPRINT']}.json"
            facts = json.loads(run(f"enchtable report --plan {path} --server URL --json"))
            metrics = {sample["name"]: sample["value"] for sample in facts["served"]["metrics"]}
            return facts["warnings"], metrics["enchtable_epoch"]

        run(plan)
        assert served() == "sv-a"
        run(swap)
        assert served() == "sv-other"
        assert reported() == ([], 1)
        run(rollback)
        assert served() == "sv-a"
        (warning,), _ = reported()
        assert "it serves another safety vector than the plan's: sv-a" in warning
        # The built-in check asks in words, which this model's tests do without.
        run(f"{rollout} --pause 0s --check true")
        assert served() == "sv-other"
        current = json.loads((root.path / "current.json").read_text())
        assert current["safety_vector"] == "sv-other"


@pytest.mark.slow
def test_metrics_are_scraped_where_nobody_may_change_anything(family, tmp_path, monkeypatch):
    """No admin token: what would change something is not there."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    serve, scrape = typed("Metrics")
    variable, *words = shlex.split(serve.replace("TASK", str(family.task)))
    assert words[:2] == ["vllm", "serve"]
    arguments = [*words[3:], *live.ARGUMENTS[2:], "--enforce-eager"]
    variables = dict([variable.split("=", 1)])
    with Server(
        Path(words[2]), arguments, tmp_path / "log", port=free_port(), variables=variables
    ) as server:
        command = scrape.replace("localhost:8000", server.url)
        assert command != scrape
        shown = samples(subprocess.check_output(["bash", "-c", command], text=True))
        assert shown["enchtable_ready"] == 1
        assert shown["enchtable_epoch"] == 0
        assert shown["enchtable_swap_seconds_count"] == 0  # which no server without our routes has
        told = httpx.get(f"{server.url}/v1/enchtable/status").json()
        assert told["active"]["safety_vector"] == "safety-vector"
        assert told["weight_version"] in str(shown.keys())
        for name in ("swap", "rollback", "probe"):
            path = f"{server.url}/v1/enchtable/{name}"
            answer = httpx.post(path, json={"safety_vector": "@none"}, headers=live.ADMIN)
            assert answer.status_code == 404, name
        assert httpx.get(f"{server.url}/v1/enchtable/status").json() == told
        paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
        ours = {path for path in paths if "enchtable" in path}
        assert ours == {"/enchtable/ready", "/v1/enchtable/status", "/v1/enchtable/vectors"}
