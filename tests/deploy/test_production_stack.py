"""The production stack's values: what its chart's schema admits, and what is in its objects."""

import copy

import jsonschema
import pytest
import yaml
from manifests import DEPLOY, production_stack, refuse_invalid, schema

TEXT = (DEPLOY / "production-stack" / "values.yaml").read_text()
VALUES = yaml.safe_load(TEXT)
SCHEMA = schema("production-stack.json")


def test_its_chart_takes_the_values():
    jsonschema.validate(VALUES, SCHEMA)


def test_its_chart_knows_every_value():
    """Its schema is open: what is misspelt would be passed over, by its templates too."""
    engine = SCHEMA["properties"]["servingEngineSpec"]["properties"]
    assert VALUES.keys() <= SCHEMA["properties"].keys()
    assert VALUES["servingEngineSpec"].keys() <= engine.keys()
    (model,) = VALUES["servingEngineSpec"]["modelSpec"]
    named = engine["modelSpec"]["items"]["properties"]
    assert model.keys() - named.keys() == {"pdb"}, "which pdb-vllm-multi.yaml reads"
    assert model["vllmConfig"].keys() <= named["vllmConfig"]["properties"].keys()


@pytest.mark.parametrize(("key", "value"), [("imagePullPolicy", "Sometimes"), ("modelSpec", {})])
def test_a_wrong_value_would_be_noticed(key, value):
    wrong = copy.deepcopy(VALUES)
    wrong["servingEngineSpec"][key] = value
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(wrong, SCHEMA)


def test_a_cluster_takes_the_pod_and_the_network_policy():
    kind = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    refuse_invalid({**kind, "spec": production_stack()})
    (policy,) = VALUES["extraObjects"]
    refuse_invalid(policy)
    spec = policy["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    ((rule,), (container,)) = spec["ingress"], production_stack()["containers"]
    assert rule["from"] == [{"podSelector": {}}]
    assert [port["port"] for port in rule["ports"]] == [p["name"] for p in container["ports"]]


def test_a_drain_leaves_one_server_and_the_key_is_a_reference():
    engine = VALUES["servingEngineSpec"]
    (model,) = engine["modelSpec"]
    assert model["pdb"] == {"enabled": True, "maxUnavailable": 1}
    assert model["replicaCount"] > 1
    assert set(engine["vllmApiKey"]) == {"secretName", "secretKey"}
