"""Engines whose vectors are not exchanged, because vLLM would go on with what the old ones left.

Asked with vLLM's own configs and connectors, in a process of its own.
"""

import json
import subprocess
import sys

import pytest
from vllm_runs import environment

CONNECTORS = {
    "OffloadingConnector": None,
    "MultiConnector": None,
    "ExampleConnector": "keeps",
    "LMCacheConnectorV1": "keeps",
    "NixlConnector": "keeps",
    "SomebodysConnector": "keeps",
}
EXPERT, QUERY = "model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.self_attn.q.weight"
PROGRAM = """
import json, sys
from types import SimpleNamespace as Some

import torch
from vllm.config import KVTransferConfig

from enchtable_vllm.serving.compat_swap import not_given_back, why_not_swappable

def worker(*, connector=None, quantization=None, is_moe=False, model=None, **parallel):
    kept = connector and KVTransferConfig(kv_connector=connector, kv_role="kv_both")
    usual = {"data_parallel_size": 1, "enable_eplb": False,
             "data_parallel_external_lb": False, "data_parallel_hybrid_lb": False}
    return Some(
        model_runner=Some(get_model=lambda: model),
        vllm_config=Some(
            model_config=Some(quantization=quantization, is_moe=is_moe),
            kv_transfer_config=kept,
            parallel_config=Some(**usual | parallel),
        ),
    )

connectors, names = json.loads(sys.argv[1])
two = {"data_parallel_size": 2}
external, hybrid = ({**two, f"data_parallel_{kind}_lb": True} for kind in ("external", "hybrid"))
linear = torch.nn.Linear(2, 2)
mixture = torch.nn.ModuleDict({"experts": torch.nn.Linear(2, 2)})
print("\\nRESULT", json.dumps({
    "plain": why_not_swappable(worker()),
    "quantised": why_not_swappable(worker(quantization="fp8")),
    "connectors": {name: why_not_swappable(worker(connector=name)) for name in connectors},
    "external": why_not_swappable(worker(is_moe=True, **external)),
    "hybrid": why_not_swappable(worker(is_moe=True, **hybrid)),
    "dense": why_not_swappable(worker(**external)),
    "internal": why_not_swappable(worker(is_moe=True, **two)),
    "experts on the CPU": not_given_back(worker(model=mixture), names),
    "experts": not_given_back(worker(model=mixture.to("meta")), names),
    "balanced": not_given_back(worker(model=mixture, enable_eplb=True), names),
    "balanced, dense": not_given_back(worker(model=linear, enable_eplb=True), names),
}))
"""


@pytest.fixture(scope="module")
def told():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([list(CONNECTORS), [EXPERT, QUERY]])],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_cache_that_a_swap_cannot_clear(told, connector):
    assert told["plain"] is None
    found = told["connectors"][connector]
    if CONNECTORS[connector] is None:
        assert found is None
    else:
        assert found.startswith(f"KV connector {connector} keeps")


def test_engines_of_other_servers_that_stop_together(told):
    assert "reaches its own alone" in told["external"]
    assert "reaches its own alone" in told["hybrid"]
    assert told["dense"] is told["internal"] is None
    assert "quantised while it loads (fp8)" in told["quantised"]


def test_experts_that_a_reload_loses_or_misplaces(told):
    assert told["experts"] == [[], ""]
    names, why = told["experts on the CPU"]
    assert (names, "packs and does not give back" in why) == ([EXPERT], True)
    names, why = told["balanced"]
    assert (names, "--enable-eplb" in why) == ([EXPERT], True)
    assert told["balanced, dense"][0] == []
