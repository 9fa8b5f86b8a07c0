"""The manifests of deploy/: rendered by Helm itself, read, and held to schemas."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import helm_python
import jsonschema
import kubernetes_validate
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


def render(values, chart=CHART):
    """Template → its text, as 'helm template' gives it, which checks the values first."""
    with helm_python.Chart.load(chart) as loaded:
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
