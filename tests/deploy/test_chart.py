"""The chart: what Helm renders is what a cluster takes, and what was promised."""

import copy
import re
import tomllib

import pytest
import yaml
from manifests import (
    CHART,
    DEPLOY,
    ROOT,
    VALUES,
    documents,
    helm,
    only,
    pod_of,
    refuse_invalid,
    render,
)

from enchtable_vllm.serving.config import LoaderConfig

CASES = pytest.mark.parametrize("case", VALUES)
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())


def changed(values, dotted, value):
    """The values with one of them set, or with a whole subtree replaced."""
    values = copy.deepcopy(values)
    *path, last = dotted.split(".")
    inner = values
    for key in path:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return values


@CASES
def test_helm_has_nothing_to_say(case):
    report = helm().lint(CHART, VALUES[case], strict=True)
    said = [m["error"] for m in report["messages"]]
    assert (report["errors"], said) == ([], ["icon is recommended"])


@CASES
def test_a_cluster_takes_every_object(case):
    found = documents(case)
    assert len(found) >= 6
    for document in found:
        refuse_invalid(document)


def test_images_are_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    files = [*DEPLOY.glob("*/*.yaml"), DEPLOY / "docker" / "Dockerfile", ROOT / "docs/deploy.md"]
    text = "\n".join(path.read_text() for path in files)
    named = re.findall(r"enchtable-vllm:([\w.-]+)", text) + re.findall(r"^ +tag: (.*)$", text, re.M)
    assert len(named) > 5
    assert {tag.removesuffix("-cpu") for tag in named} == {version}


def test_everything_is_really_on():
    kinds = sorted(d["kind"] for d in documents("everything"))
    assert kinds == [
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Ingress", "NetworkPolicy",
        "PodDisruptionBudget", "PodMonitor", "PrometheusRule", "Service", "Service",
        "ServiceAccount",
    ]  # fmt: skip


@CASES
def test_services_and_policies_select_the_pods_and_nothing_wider(case):
    found = documents(case)
    deployment = only(found, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector.items() <= labels.items()
    selectors = [d["spec"]["selector"] for d in found if d["kind"] == "Service"]
    selectors += [
        d["spec"]["selector"]["matchLabels"]
        for d in found
        if d["kind"] in ("PodDisruptionBudget", "PodMonitor")
    ]
    selectors += [only(found, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]]
    assert all(one == selector for one in selectors)
    names = {port["name"] for port in pod_of(deployment)["containers"][0]["ports"]}
    targets = {p["targetPort"] for d in found if d["kind"] == "Service" for p in d["spec"]["ports"]}
    assert targets == names == {"http"}


def test_what_refers_to_a_name_refers_to_one_that_is_there():
    found = documents("everything")
    deployment = only(found, "Deployment")
    (port,) = pod_of(deployment)["containers"][0]["ports"]
    (endpoint,) = only(found, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")
    (service,) = [d for d in found if d["kind"] == "Service" and "clusterIP" not in d["spec"]]
    (served,) = service["spec"]["ports"]
    (rule,) = only(found, "Ingress")["spec"]["rules"]
    backend = {"name": service["metadata"]["name"], "port": {"name": served["name"]}}
    assert all(path["backend"] == {"service": backend} for path in rule["http"]["paths"])
    scaled = only(found, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert scaled == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }


@CASES
def test_a_drain_takes_one_pod_at_a_time(case):
    budget = only(documents(case), "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert "minAvailable" not in budget


def test_a_rollout_finds_pods_that_are_not_ready():
    service = only(documents("minimal"), "Service", "-headless")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    assert service["ports"][0]["port"] == 8000


def test_alerts_and_dashboard_are_the_ones_of_this_repository():
    found = documents("everything")
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    assert text.count('{job=~".+"}') == 1
    # What must show metrics of enchtable is this release alone, as its pod monitor names it.
    job = "models/" + only(found, "PodMonitor")["metadata"]["name"]
    alerts = yaml.safe_load(text.replace('job=~".+"', f'job=~"{job}"'))
    assert only(found, "PrometheusRule")["spec"] == alerts
    shown = only(found, "ConfigMap")["data"]["enchtable.json"]
    assert yaml.safe_load(shown) == yaml.safe_load(
        (DEPLOY / "grafana" / "enchtable.json").read_text()
    )


def test_the_jobs_in_which_every_server_merges_can_be_named():
    texts = render(changed(VALUES["everything"], "prometheusRule.jobs", r"models/.*|chat\d"))
    (rule,) = [t for name, t in texts.items() if name.endswith("/prometheusrule.yaml")]
    rules = yaml.safe_load(rule)["spec"]["groups"][0]["rules"]
    (absent,) = [r for r in rules if r["alert"] == "EnchTableAbsent"]
    assert r'{job=~"models/.*|chat\\d"}' in absent["expr"]  # doubled: a string of PromQL's


def test_a_packaged_chart_renders_the_same(tmp_path):
    """Its links to the alerts and the dashboard are files then."""
    packed = helm().package(CHART, destination=tmp_path)
    values = VALUES["everything"]
    assert render(values, packed) == render(values)


def test_tensor_parallelism_asks_for_as_many_gpus():
    container = pod_of(only(documents("tensor-parallel"), "Deployment"))["containers"][0]
    assert "--tensor-parallel-size=4" in container["args"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    cpu = pod_of(only(documents("cpu"), "Deployment"))["containers"][0]
    assert "nvidia.com/gpu" not in cpu["resources"]["limits"]


def test_autoscaling_owns_the_replicas():
    assert "replicas" not in only(documents("everything"), "Deployment")["spec"]
    assert only(documents("tensor-parallel"), "Deployment")["spec"]["replicas"] == 3


def test_a_strategy_without_rolling_has_no_rolling_part():
    values = changed(VALUES["minimal"], "strategy.type", "Recreate")
    (text,) = [t for n, t in render(values).items() if n.endswith("/deployment.yaml")]
    assert yaml.safe_load(text)["spec"]["strategy"] == {"type": "Recreate"}


def test_the_outside_reaches_a_list_of_paths_and_no_other():
    rule = only(documents("everything"), "Ingress")["spec"]["rules"][0]
    paths = rule["http"]["paths"]
    assert {path["pathType"] for path in paths} == {"Exact"}
    assert [path["path"] for path in paths] == DEFAULTS["ingress"]["paths"]
    assert not any("enchtable" in path["path"] or path["path"] == "/metrics" for path in paths)
    assert "defaultBackend" not in only(documents("everything"), "Ingress")["spec"]


def test_notes_say_what_is_open():
    said = {name: render(VALUES[name])["enchtable-vllm/templates/NOTES.txt"] for name in VALUES}
    targets = "--targets dns://demo-enchtable-vllm-headless.models:8000"
    assert targets in said["tensor-parallel"]
    assert "plain http" in said["tensor-parallel"]
    assert "plain http" not in said["everything"]
    assert "whoever reaches the port" in said["minimal"]
    assert "whoever reaches the port" not in said["everything"]


@pytest.mark.parametrize(
    ("dotted", "value", "says"),
    [
        ("model.id", "", "/model/id"),
        ("model.id", "models/with space", "/model/id"),
        ("model.revision", "main", "/model/revision"),
        ("modle", {}, "modle"),
        ("vectors.active", "@newest", "/vectors/active"),
        ("vectors.active", "org/name@main", "/vectors/active"),
        ("vectors.active", "@current", "Give 'vectors.volume'"),
        (
            "vectors.download",
            [{"name": "a", "repository": "org/a", "commit": "main"}],
            "/vectors/download/0/commit",
        ),
        ("loader.beta", -1, "/loader/beta"),
        ("loader.require_signature", {"method": "pgp"}, "/loader/require_signature/method"),
        ("loader.vector_root", "/elsewhere", "vector_root"),
        ("tensorParallelSize", 0, "/tensorParallelSize"),
        ("image.digest", "sha256:12", "/image/digest"),
        ("ingress.paths", ["/v1/enchtable/swap"], "/ingress/paths/0"),
        ("ingress.paths", ["/v1/"], "/ingress/paths/0"),
        ("ingress.enabled", True, "/ingress"),
        ("prometheusRule.jobs", 'a"} or {', "/prometheusRule/jobs"),
        ("extraArgs", ["--api-key=secret"], "got '--api-key'"),
        ("extraArgs", ["--load_format", "auto"], "got '--load-format'"),
        ("extraEnv", [{"name": "VLLM_SERVER_DEV_MODE", "value": "1"}], "without any token"),
        ("autoscaling", {"enabled": True, "minReplicas": 3, "maxReplicas": 2}, "got 2"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_values_are_refused_by_name(dotted, value, says):
    values = changed(VALUES["minimal"], dotted, value)
    with pytest.raises(helm().HelmError) as refused:
        render(values)
    assert says in str(refused.value)


def test_whoever_downloads_knows_the_mirror_too():
    mirror = {"name": "HF_ENDPOINT", "value": "https://hub.example.com"}
    values = changed(VALUES["hub"], "extraEnv", [mirror])
    text = render(values)["enchtable-vllm/templates/deployment.yaml"]
    pod = yaml.safe_load(text)["spec"]["template"]["spec"]
    both = [*pod["initContainers"], *pod["containers"]]
    assert len(both) == 2
    assert all(mirror in container["env"] for container in both)


def test_what_is_downloaded_into_each_pod_holds_no_current():
    values = changed(VALUES["hub"], "vectors.active", "@current")
    with pytest.raises(helm().HelmError, match=r"Give 'vectors\.volume'"):
        render(values)


def test_a_volume_and_a_download_exclude_each_other():
    values = changed(VALUES["hub"], "vectors.volume", {"emptyDir": {}})
    with pytest.raises(helm().HelmError, match="got both"):
        render(values)


def test_the_loaders_keys_are_all_to_be_had():
    with helm().Chart.load(CHART) as chart:
        keys = set(chart.schema["properties"]["loader"]["properties"])
    # These two have values of their own.
    assert keys == LoaderConfig.model_fields.keys() - {"safety_vector", "vector_root"}
