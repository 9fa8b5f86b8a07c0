"""Engines whose vectors are not exchanged, because vLLM would go on with what the old ones left.

Asked with vLLM's own configs and connectors, in a process of its own.
"""

import json
import subprocess
import sys

import pytest
from vllm_runs import environment


def several(*connectors):
    return {"connectors": [{"kv_connector": n, "kv_role": "kv_both", **m} for n, m in connectors]}


def further(**config):
    return {"kv_connector_extra_config": config}


TIERED = further(spec_name="TieringOffloadingSpec", secondary_tiers=[{"type": "fs"}])
NESTED = further(**several(("OffloadingConnector", TIERED)))
#: Connector, what else it is told, and how it is called where it keeps something.
CONNECTORS = {
    "host memory": ("OffloadingConnector", {}, None),
    "host memory, by name": ("OffloadingConnector", {"spec_name": "CPUOffloadingSpec"}, None),
    "host memory and more": (
        "OffloadingConnector",
        TIERED["kv_connector_extra_config"],
        "OffloadingConnector (TieringOffloadingSpec)",
    ),
    "several that are cleared": (
        "MultiConnector",
        several(("OffloadingConnector", {}), ("SimpleCPUOffloadConnector", {})),
        None,
    ),
    "one of several that is not": (
        "MultiConnector",
        several(("OffloadingConnector", {}), ("NixlConnector", {})),
        "MultiConnector's NixlConnector",
    ),
    "several within several": (
        "MultiConnector",
        several(("MultiConnector", NESTED)),
        "MultiConnector's MultiConnector's OffloadingConnector (TieringOffloadingSpec)",
    ),
    "several, not named": ("MultiConnector", {}, "MultiConnector"),
    "an example": ("ExampleConnector", {}, "ExampleConnector"),
    "LMCache": ("LMCacheConnectorV1", {}, "LMCacheConnectorV1"),
    "Nixl": ("NixlConnector", {}, "NixlConnector"),
    "somebody's": ("SomebodysConnector", {}, "SomebodysConnector"),
}
EXPERT, QUERY = "model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.self_attn.q.weight"
PROGRAM = """
import json, sys
from types import SimpleNamespace as Some

import torch
from vllm.config import KVTransferConfig
from vllm.config.offload import OffloadConfig

from enchtable_vllm.serving.compat_swappable import not_given_back, why_not_swappable

def worker(
    *, connector=None, quantization=None, is_moe=False, model=None, offload=None, **parallel
):
    kept = connector and KVTransferConfig(
        kv_connector=connector[0], kv_role="kv_both", kv_connector_extra_config=connector[1]
    )
    usual = {"data_parallel_size": 1, "enable_eplb": False,
             "data_parallel_external_lb": False, "data_parallel_hybrid_lb": False}
    model = torch.nn.Identity() if model is None else model
    return Some(
        model_runner=Some(get_model=lambda: model),
        vllm_config=Some(
            model_config=Some(quantization=quantization, is_moe=is_moe),
            kv_transfer_config=kept,
            offload_config=OffloadConfig(**offload or {}),
            parallel_config=Some(**usual | parallel),
        ),
    )

connectors, names = json.loads(sys.argv[1])
two = {"data_parallel_size": 2}
external, hybrid = ({**two, f"data_parallel_{kind}_lb": True} for kind in ("external", "hybrid"))
linear = torch.nn.Linear(2, 2)
finishing, joined, routed = (torch.nn.Linear(2, 2) for _ in range(3))
finishing.process_weights_after_loading = print
inside = torch.nn.Sequential(joined)
joined._merged_conv_weight = joined.weight.data
routed._combined_gate_weight = routed.weight.data
unused = torch.nn.Linear(2, 2)
unused._merged_conv_weight = unused._combined_gate_weight = None
mixture = torch.nn.ModuleDict({"experts": torch.nn.Linear(2, 2)})
split = torch.nn.Linear(2, 2)
split._bf16x3_weight = split.weight.data
laid_out = torch.nn.Linear(2, 2)
laid_out._moonep_weight_layout = "some"
print("\\nRESULT", json.dumps({
    "plain": why_not_swappable(worker()),
    "quantised": why_not_swappable(worker(quantization="fp8")),
    "connectors": {n: why_not_swappable(worker(connector=one)) for n, one in connectors.items()},
    "finishing": why_not_swappable(worker(model=finishing)),
    "joined": why_not_swappable(worker(model=inside)),
    "not joined yet": why_not_swappable(worker(model=unused)),
    "routed": not_given_back(worker(model=routed), names),
    "not routed yet": not_given_back(worker(model=unused), names),
    "prefetched": why_not_swappable(worker(offload={"prefetch": {"offload_group_size": 4}})),
    "offloaded": why_not_swappable(worker(offload={"uva": {"cpu_offload_gb": 1}})),
    "external": why_not_swappable(worker(is_moe=True, **external)),
    "hybrid": why_not_swappable(worker(is_moe=True, **hybrid)),
    "dense": why_not_swappable(worker(**external)),
    "internal": why_not_swappable(worker(is_moe=True, **two)),
    "experts on the CPU": not_given_back(worker(model=mixture), names),
    "experts": not_given_back(worker(model=mixture.to("meta")), names),
    "balanced": not_given_back(worker(model=mixture, enable_eplb=True), names),
    "split": not_given_back(worker(model=split), names),
    "laid out": not_given_back(worker(model=laid_out), names),
    "balanced, dense": not_given_back(worker(model=linear, enable_eplb=True), names),
}))
"""


@pytest.fixture(scope="module")
def told():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([CONNECTORS, [EXPERT, QUERY]])],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_cache_that_a_swap_cannot_clear(told, connector):
    assert told["plain"] is None
    found, name = told["connectors"][connector], CONNECTORS[connector][2]
    if name is None:
        assert found is None
    else:
        assert found.startswith(f"KV connector {name} keeps")


def test_layers_whose_lasting_weights_a_reload_does_not_reach(told):
    assert "--offload-group-size" in told["prefetched"]
    assert told["offloaded"] is None


def test_what_a_model_computes_of_its_weights_once(told):
    """A reload puts back parameters and buffers, and nothing that was made of them."""
    assert "a step of its own" in told["finishing"]
    assert "would go on with those" in told["joined"]
    assert told["not joined yet"] is None
    assert told["routed"][0] == [EXPERT]
    assert "does not join anew" in told["routed"][1]
    assert told["not routed yet"] == [[], ""]


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
    names, why = told["split"]
    assert (names, "router" in why) == ([EXPERT], True)
    names, why = told["laid out"]
    assert (names, "MoonEP" in why) == ([EXPERT], True)
