"""The manifests of deploy/: rendered by Helm itself, read, and held to schemas."""

from __future__ import annotations

import json
import platform
import sys
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "enchtable-vllm"
SCHEMAS = Path(__file__).parent / "schemas"
#: File name → values: one for each way of installing the chart that is looked at.
VALUES = {
    path.name.removesuffix("-values.yaml"): yaml.safe_load(path.read_text())
    for path in sorted((CHART / "ci").glob("*-values.yaml"))
}
#: The oldest that the chart admits, and the newest whose schemas are to be had.
KUBERNETES = ("1.28", kubernetes_validate.latest_version())
#: Kinds that operators define, and their schemas.
OPERATORS = {"PodMonitor": "PodMonitor.json", "PrometheusRule": "PrometheusRule.json"}


def helm():
    """Helm's own library, for the machines for which pyproject.toml asks for it."""
    if sys.platform == "linux" and (machine := platform.machine()) != "x86_64":
        pytest.skip(f"there is no wheel of Helm's library for {machine}: no chart can be rendered")
    import helm_python

    return helm_python


def render(values, chart=CHART):
    """Template → its text, as 'helm template' gives it, which checks the values first."""
    with helm().Chart.load(chart) as loaded:
        loaded.validate_schema(values)
        return loaded.render(values, name="demo", namespace="models")


@cache
def documents(name):
    """All objects that a file of values gives."""
    texts = render(VALUES[name])
    return [
        document
        for template, text in sorted(texts.items())
        if template.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


def only(found, kind, suffix=""):
    """The one object of a kind whose name ends like this."""
    (one,) = [d for d in found if d["kind"] == kind and d["metadata"]["name"].endswith(suffix)]
    return one


def pod_of(document):
    return document["spec"]["template"]["spec"]


def production_stack():
    """The pod that the production stack's chart makes of our values for it.

    What its deployment-vllm-multi.yaml does with the values that are set; the labels, variables
    and ports that it adds for itself are not here.
    """
    engine = yaml.safe_load((DEPLOY / "production-stack" / "values.yaml").read_text())[
        "servingEngineSpec"
    ]
    (model,) = engine["modelSpec"]
    config = model["vllmConfig"]
    gpus = {"nvidia.com/gpu": str(model["requestGPU"])}
    own = ["--host", "0.0.0.0", "--port", "8000", "--no-enable-prefix-caching"]
    own += ["--tensor-parallel-size", str(config["tensorParallelSize"])]
    container = {
        "name": "vllm",
        "image": f"{model['repository']}:{model['tag']}",
        "imagePullPolicy": engine["imagePullPolicy"],
        "command": ["vllm", "serve", model["modelURL"], *own, *config["extraArgs"]],
        "env": model["env"],
        "ports": [{"containerPort": 8000, "name": "container-port"}],
        "resources": {
            "requests": {"cpu": str(model["requestCPU"]), "memory": model["requestMemory"], **gpus},
            "limits": {"memory": model["limitMemory"], **gpus},
        },
        "securityContext": engine["containerSecurityContext"],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *model["extraVolumeMounts"]],
    }
    container |= {name: engine[name] for name in engine if name.endswith("Probe")}
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": model["shmSize"]}}
    return {
        "securityContext": engine["securityContext"],
        "containers": [container],
        "volumes": [shm, *model["extraVolumes"]],
    }


def schema(name, part=None):
    """A schema of tests/deploy/schemas, or one definition in it."""
    loaded = json.loads((SCHEMAS / name).read_text())
    return loaded if part is None else {**loaded, "$ref": f"#/$defs/{part}"}


def refuse_invalid(document):
    """Fail, if a cluster would refuse an object: unknown keys, wrong types, what is missing."""
    if document["kind"] in OPERATORS:
        jsonschema.validate(document, schema(OPERATORS[document["kind"]]))
        return
    for version in KUBERNETES:
        kubernetes_validate.validate(document, version, strict=True)


def environment(container):
    """Variables that a container sets itself, by name."""
    return {entry["name"]: entry.get("value") for entry in container["env"]}
