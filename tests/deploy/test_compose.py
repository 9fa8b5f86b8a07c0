"""The Compose project: what Compose reads, and what Prometheus and Grafana find in it."""

import json
import re
import shutil
import subprocess
import time
from contextlib import suppress
from urllib.request import urlopen

import jsonschema
import pytest
import yaml
from manifests import DEPLOY, ROOT, schema
from prometheus import program

from enchtable_vllm.demo.server import free_port

FOLDER = DEPLOY / "compose"
TEXT = (FOLDER / "compose.yaml").read_text()
PROJECT = yaml.safe_load(TEXT)


RESET = object()


class Loader(yaml.SafeLoader):
    """Reads Compose's '!reset' as what says that a key is to go."""


Loader.add_constructor("!reset", lambda *_: RESET)


def merged(below, above):
    """Two files as Compose makes one of them: key by key; a list would be appended, so none is."""
    found = dict(below)
    for key, value in above.items():
        assert not isinstance(value, list), key
        if value is RESET:
            del found[key]
        elif isinstance(value, dict) and isinstance(found.get(key, {}), dict):
            found[key] = merged(found.get(key, {}), value)
        else:
            found[key] = value
    return found


CPU = merged(PROJECT, yaml.load((FOLDER / "compose.cpu.yaml").read_text(), Loader))


def bound(service, target):
    """The file or folder of this repository that a service sees at a path."""
    for volume in PROJECT["services"][service]["volumes"]:
        source, at, *_ = volume.split(":")
        if at == target:
            return (FOLDER / source).resolve()
    raise AssertionError(f"nothing at {target}")


@pytest.mark.parametrize("project", [PROJECT, CPU], ids=["compose.yaml", "with compose.cpu.yaml"])
def test_it_is_what_the_specification_says(project):
    jsonschema.validate(project, schema("compose-spec.json"), jsonschema.Draft7Validator)


def test_without_a_gpu_only_image_and_devices_are_others():
    server, base = CPU["services"]["vllm"], PROJECT["services"]["vllm"]
    assert base["deploy"]["resources"]["reservations"]["devices"]
    assert "deploy" not in server
    assert server["build"] == {
        **base["build"], "args": {"BASE_IMAGE": "vllm/vllm-openai-cpu:v0.32.0-x86_64"}
    }  # fmt: skip
    assert server["image"] == base["image"].replace("}", "-cpu}")
    assert server["environment"].items() >= base["environment"].items()
    changed = {"deploy", "build", "image", "environment"}
    assert {key for key in base if server.get(key) != base[key]} == changed
    assert server.keys() < base.keys()
    others = CPU | {"services": CPU["services"] | {"vllm": base}}
    assert others == PROJECT


def test_every_variable_has_a_default_or_is_in_the_example():
    required = set(re.findall(r"\$\{(\w+):\?", TEXT))
    example = (FOLDER / "example.env").read_text()
    assert required == set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    assert set(re.findall(r"\$\{(\w+)\}", TEXT)) == set()
    optional = set(re.findall(r"^# (\w+)=", example, re.MULTILINE))
    assert optional <= set(re.findall(r"\$\{(\w+):-", TEXT))


def test_nothing_listens_on_the_network_and_nothing_gains_rights():
    for service in PROJECT["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
    assert PROJECT["services"]["vllm"]["read_only"] is True


def test_secrets_are_files():
    for service in PROJECT["services"].values():
        for name, value in service.get("environment", {}).items():
            assert not re.search("TOKEN|PASSWORD", name) or name.endswith("_FILE")
            assert not name.endswith("_FILE") or value.rpartition("/")[2] in service["secrets"]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """Asks a real one for a path: its configuration lies as in the container, by the volumes."""
    folder = tmp_path_factory.mktemp("prometheus")
    for volume in PROJECT["services"]["prometheus"]["volumes"]:
        source, at, *_ = volume.split(":")
        if at.startswith("/etc/prometheus/"):
            shutil.copy(FOLDER / source, folder / at.removeprefix("/etc/prometheus/"))
    address = f"127.0.0.1:{free_port()}"
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yml",
               f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]  # fmt: skip

    def ask(path):
        with urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.read()

    log = folder / "log"
    with log.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            with suppress(OSError):
                ask("/-/ready")
                break
            time.sleep(0.2)
        yield lambda path: json.loads(ask(path))["data"]
    finally:
        process.terminate()
        process.wait(30)


def test_prometheus_has_every_alert(prometheus):
    (group,) = prometheus("/api/v1/rules?type=alert")["groups"]
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    assert [rule["name"] for rule in group["rules"]] == re.findall(r"- alert: (\w+)", text)
    assert not [rule["lastError"] for rule in group["rules"] if "lastError" in rule]


def test_prometheus_asks_the_server_for_its_metrics(prometheus):
    deadline = time.monotonic() + 60
    while not (found := prometheus("/api/v1/targets")["activeTargets"]):  # looked up every 5 s
        assert time.monotonic() < deadline
        time.sleep(0.5)
    (target,) = found
    assert target["labels"]["job"] == "vllm"
    server = PROJECT["services"]["vllm"]
    port = server["ports"][0].rpartition(":")[2]
    assert target["scrapeUrl"] == f"http://vllm:{port}/metrics"


def test_grafana_finds_its_source_and_the_dashboard():
    sources = yaml.safe_load(
        bound("grafana", "/etc/grafana/provisioning/datasources/enchtable.yaml").read_text()
    )
    (source,) = sources["datasources"]
    assert source["url"].split("/")[2].split(":")[0] in PROJECT["services"]
    providers = yaml.safe_load(
        bound("grafana", "/etc/grafana/provisioning/dashboards/enchtable.yaml").read_text()
    )
    folder = bound("grafana", providers["providers"][0]["options"]["path"])
    (dashboard,) = folder.glob("*.json")
    (variable,) = [
        v
        for v in json.loads(dashboard.read_text())["templating"]["list"]
        if v["type"] == "datasource"
    ]
    assert variable["query"] == source["type"]


def test_the_image_is_built_from_this_repository():
    build = PROJECT["services"]["vllm"]["build"]
    assert (FOLDER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
