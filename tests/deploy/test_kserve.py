"""KServe's objects: what its types admit, what Kubernetes admits in them, and that they fit."""

import copy

import jsonschema
import pytest
import yaml
from manifests import DEPLOY, refuse_invalid, schema

RUNTIME = yaml.safe_load((DEPLOY / "kserve" / "servingruntime.yaml").read_text())
SERVICE = yaml.safe_load((DEPLOY / "kserve" / "inferenceservice.yaml").read_text())
KINDS = ("V1alpha1ServingRuntime", "V1beta1InferenceService")


def test_kserve_takes_them():
    for kind, document in zip(KINDS, (RUNTIME, SERVICE), strict=True):
        jsonschema.validate(document, schema("kserve.json", kind))


def without(document, *path):
    """A copy that lacks what a path leads to; (key, value) at its end: one that has another."""
    copied = inner = copy.deepcopy(document)
    *path, last = path
    for key in path:
        inner = inner[key]
    if isinstance(last, tuple):
        inner[last[0]] = last[1]
    else:
        del inner[last]
    return copied


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        (KINDS[0], without(RUNTIME, "spec", ("supportedModelFormat", [])), "supportedModelFormat"),
        (KINDS[0], without(RUNTIME, "spec", "containers"), "'containers' is a required"),
        (
            KINDS[0],
            without(RUNTIME, "spec", "supportedModelFormats", 0, "name"),
            "'name' is a required",
        ),
        (KINDS[0], without(RUNTIME, "spec"), "'spec' is a required"),
        (KINDS[0], without(RUNTIME, "metadata"), "'metadata' is a required"),
        (KINDS[0], without(RUNTIME, ("kind", "Foo")), "'ServingRuntime' was expected"),
        (
            KINDS[0],
            without(RUNTIME, ("apiVersion", "serving.kserve.io/v1beta1")),
            "v1alpha1' was expected",
        ),
        (KINDS[1], without(SERVICE, "spec", "predictor"), "'predictor' is a required"),
        (
            KINDS[1],
            without(SERVICE, "spec", "predictor", "model", "modelFormat"),
            "'modelFormat' is a",
        ),
        (
            KINDS[1],
            without(SERVICE, "spec", "predictor", "model", "modelFormat", "name"),
            "'name' is a",
        ),
        (KINDS[1], without(SERVICE, "kind"), "'kind' is a required"),
        (KINDS[1], without(SERVICE, ("apiVersion", "v1")), "v1beta1' was expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_or_missing_is_noticed(kind, wrong, says):
    with pytest.raises(jsonschema.ValidationError, match=says):
        jsonschema.validate(wrong, schema("kserve.json", kind))


def test_kubernetes_takes_the_containers_in_it():
    spec = {key: RUNTIME["spec"][key] for key in ("containers", "volumes")}
    refuse_invalid({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec})


def test_the_service_asks_for_this_runtime():
    model = SERVICE["spec"]["predictor"]["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    formats = [one["name"] for one in RUNTIME["spec"]["supportedModelFormats"]]
    assert model["modelFormat"]["name"] in formats


def test_metrics_are_on_the_port_that_is_served():
    port = str(RUNTIME["spec"]["containers"][0]["ports"][0]["containerPort"])
    assert RUNTIME["spec"]["annotations"]["prometheus.kserve.io/port"] == port
    assert f"--port={port}" in RUNTIME["spec"]["containers"][0]["args"]
