"""KServe's objects: what its types admit, what Kubernetes admits in them, and that they fit."""

import jsonschema
import pytest
import yaml
from manifests import DEPLOY, refuse_invalid, schema

RUNTIME = yaml.safe_load((DEPLOY / "kserve" / "servingruntime.yaml").read_text())
SERVICE = yaml.safe_load((DEPLOY / "kserve" / "inferenceservice.yaml").read_text())


def test_kserve_takes_them():
    jsonschema.validate(RUNTIME, schema("kserve.json", "V1alpha1ServingRuntime"))
    jsonschema.validate(SERVICE, schema("kserve.json", "V1beta1InferenceService"))


def test_a_misspelt_key_would_be_noticed():
    wrong = {**RUNTIME, "spec": {**RUNTIME["spec"], "supportedModelFormat": []}}
    with pytest.raises(jsonschema.ValidationError, match="supportedModelFormat"):
        jsonschema.validate(wrong, schema("kserve.json", "V1alpha1ServingRuntime"))


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
