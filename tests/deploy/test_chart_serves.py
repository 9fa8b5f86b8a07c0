"""The container that the chart starts, started: its command, variables, volumes and probes."""

import json
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from live import TOKEN, make_root
from manifests import DEPLOY, environment, pod_of, render

from enchtable_vllm.demo.server import Server, free_port

#: What a cluster would bring, and where the test has it.
VOLUMES = ("models", "vectors", "admin-token", "home")


def values(model):
    return {
        "model": {"id": f"/models/{model}", "volume": {"emptyDir": {}}},
        "vectors": {"active": "sv-a", "volume": {"emptyDir": {}}},
        "adminToken": {"secretName": "enchtable-admin"},
        "gpu": {"count": 0},
        "extraArgs": ["--dtype=bfloat16", "--max-model-len=128", "--skip-tokenizer-init"],
    }


@pytest.fixture
def root(family, tmp_path):
    return make_root(family, tmp_path / "vectors")


@pytest.mark.slow
def test_what_the_chart_starts_serves_is_ready_and_can_be_swapped(root, tmp_path):
    (text,) = [
        text
        for name, text in render(values(root.family.task.name)).items()
        if name.endswith("/deployment.yaml")
    ]
    (container,) = pod_of(yaml.safe_load(text))["containers"]
    token = tmp_path / "token"
    token.mkdir()
    (token / "token").write_text(TOKEN)
    places = dict(zip(VOLUMES, (root.family.task.parent, root.path, token, tmp_path), strict=True))
    mounted = {
        mount["mountPath"]: str(places[mount["name"]])
        for mount in container["volumeMounts"]
        if mount["name"] in places
    }
    assert len(mounted) == len(VOLUMES)

    def here(word):
        for at, place in mounted.items():
            word = word.replace(at, place)
        return word

    model, *arguments = map(here, container["args"])
    variables = {name: here(value) for name, value in environment(container).items()}
    server = Server(Path(model), arguments, tmp_path / "log", port=free_port(), variables=variables)
    with server:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            with urlopen(server.url + container[probe]["httpGet"]["path"], timeout=30) as answer:
                assert answer.status == 200
        ready = subprocess.run(
            [sys.executable, DEPLOY / "docker" / "ready.py"],
            env={"READY_URL": f"{server.url}/enchtable/ready"},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (ready.returncode, json.loads(ready.stdout)["ready"]) == (0, True)
        swapped = subprocess.run(
            [sys.executable, "-m", "enchtable_vllm.cli", "swap", "--url", server.url,
             "--safety-vector", "sv-b", "--persist", "--admin-token-file", token / "token"],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert swapped.returncode == 0, swapped.stderr
        assert json.loads((root.path / "current.json").read_text())["safety_vector"] == "sv-b"
        with urlopen(f"{server.url}/metrics", timeout=30) as answer:
            assert "enchtable_active_vector_info{digest=" in answer.read().decode()
    assert (tmp_path / ".cache").is_dir(), "what vLLM writes is in its home"
