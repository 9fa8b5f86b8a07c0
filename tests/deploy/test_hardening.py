"""Pods that run with as little as they need: each rule on every manifest that starts vLLM."""

import re

import pytest
import yaml
from manifests import DEPLOY, VALUES, documents, environment, only, pod_of, production_stack

KSERVE = yaml.safe_load((DEPLOY / "kserve" / "servingruntime.yaml").read_text())
#: Manifests that are not of our chart, and their pods.
OTHERS = {"kserve": KSERVE["spec"], "production stack": production_stack()}
CASES = pytest.mark.parametrize("case", [*VALUES, *OTHERS])
#: Where vLLM, torch, Triton and the Hub's client write: nowhere else, on a read-only root.
WRITTEN = {"/home/vllm", "/tmp", "/dev/shm"}


def pod(case):
    return OTHERS[case] if case in OTHERS else pod_of(only(documents(case), "Deployment"))


def containers(case):
    found = pod(case)
    return found.get("initContainers", []) + found["containers"]


def server(case):
    (one,) = pod(case)["containers"]
    return one


@CASES
def test_nothing_runs_as_root_or_gains_rights(case):
    for container in containers(case):
        context = pod(case).get("securityContext", {}) | container["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] >= 1000
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "privileged" not in context


@CASES
def test_the_root_file_system_is_read_only_and_what_is_written_is_on_volumes(case):
    volumes = {volume["name"]: volume for volume in pod(case)["volumes"]}
    assert all(len(volume) == 2 for volume in volumes.values()), "a volume has one source"
    used = set()
    for container in containers(case):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        used |= {mount["name"] for mount in mounts.values()}
        assert environment(container)["HOME"] == "/home/vllm"
        if container is server(case):
            assert mounts.keys() >= WRITTEN
            writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
            assert writable - WRITTEN <= {"/vectors"}
    assert used == volumes.keys()
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


@CASES
def test_resources_are_bounded(case):
    for container in containers(case):
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


@CASES
def test_probes_ask_for_what_they_mean(case):
    """Ready: it serves what it should. Alive: its engine runs; a failed swap must not kill it."""
    probes = {
        name: server(case)[f"{name}Probe"]["httpGet"]
        for name in ("startup", "readiness", "liveness")
    }
    paths = {name: probe["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/health", "readiness": "/enchtable/ready", "liveness": "/health"}
    (port,) = server(case)["ports"]
    (asked,) = {probe["port"] for probe in probes.values()}
    assert asked in (port.get("name"), port["containerPort"])
    startup = server(case)["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    tls = any(a.startswith("--ssl-certfile") for a in server(case).get("args", []))
    assert {probe.get("scheme", "HTTP") for probe in probes.values()} == {
        "HTTPS" if tls else "HTTP"
    }


@pytest.mark.parametrize("case", VALUES)
def test_requests_under_way_are_given_the_time_to_end(case):
    (drain,) = [a for a in server(case)["args"] if a.startswith("--shutdown-timeout=")]
    wait = int(server(case)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod(case)["terminationGracePeriodSeconds"] >= wait + int(drain.partition("=")[2]) + 20


@CASES
def test_images_are_named_exactly(case):
    for container in containers(case):
        assert re.search(r":\d+\.\d+\.\d+(-cpu)?$|@sha256:[0-9a-f]{64}$", container["image"])


@CASES
def test_the_plugin_is_switched_on(case):
    assert environment(server(case))["VLLM_PLUGINS"] == "enchtable"


@pytest.mark.parametrize("case", VALUES)
def test_no_secret_is_in_a_manifest(case):
    """Tokens and keys are files, or references; arguments are visible to a whole node."""
    for container in containers(case):
        for entry in container["env"]:
            if re.search("TOKEN|KEY", entry["name"]) and not entry["name"].endswith("_FILE"):
                assert "secretKeyRef" in entry["valueFrom"]
        words = " ".join(container["command"] + container.get("args", []))
        assert "--api-key" not in words
        assert "--token" not in words
    assert not [d for d in documents(case) if d["kind"] == "Secret"]


@pytest.mark.parametrize("case", VALUES)
def test_pods_have_no_token_of_kubernetes_and_no_variables_of_services(case):
    found = documents(case)
    assert pod(case)["automountServiceAccountToken"] is False
    assert pod(case)["enableServiceLinks"] is False
    assert only(found, "ServiceAccount")["automountServiceAccountToken"] is False
    name = only(found, "ServiceAccount")["metadata"]["name"]
    assert pod(case)["serviceAccountName"] == name


def test_the_admin_token_is_a_file_that_can_be_exchanged():
    """A mount by subPath would keep the old token until the pod is replaced."""
    (mount,) = [m for m in server("everything")["volumeMounts"] if m["name"] == "admin-token"]
    assert mount["readOnly"] is True
    assert "subPath" not in mount
    named = environment(server("everything"))["ENCHTABLE_ADMIN_TOKEN_FILE"]
    (volume,) = [v for v in pod("everything")["volumes"] if v["name"] == "admin-token"]
    assert named == f"{mount['mountPath']}/{volume['secret']['items'][0]['path']}"
    assert volume["secret"]["items"][0]["key"] == "admin"
    assert volume["secret"]["defaultMode"] == 0o440
    assert "ENCHTABLE_ADMIN_TOKEN_FILE" not in environment(server("minimal"))


def test_a_token_of_the_hubs_stays_with_whoever_downloads():
    (download,) = pod("hub")["initContainers"]
    assert "HF_TOKEN" in environment(download)
    assert "HF_TOKEN" in environment(server("hub"))  # it downloads the model itself
    assert environment(server("everything"))["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in environment(server("everything"))


def test_the_network_policy_names_who_may_come_in():
    policy = only(documents("minimal"), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["ingress"] == [
        {"from": [{"podSelector": {}}], "ports": [{"port": "http", "protocol": "TCP"}]}
    ]
    policy = only(documents("everything"), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert len(policy["ingress"][0]["from"]) == 3
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53}


def test_kserve_offers_no_way_to_swap():
    """Its clients reach the whole port."""
    assert not [name for name in environment(server("kserve")) if "ADMIN" in name]
