"""Several ranks: experts spread over them, and whole engines side by side.

Tensor parallelism is in `test_bit_identity`.
"""

import re
from pathlib import Path

import architectures
import models
import pytest
from vllm_runs import changed, merged_offline, probe

ENGINES = Path(__file__).with_name("probe_engines.py")
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    aligned = architectures.tiny("qwen3_moe", folder / "aligned")
    family = models.make_family(aligned, folder, scope="attention+ffn")
    return family, merged_offline(family, folder / "merged")


@pytest.mark.slow
@pytest.mark.supports("expert parallelism (`--enable-expert-parallel`, two ranks; loading)")
def test_each_rank_holds_the_offline_merge_of_its_own_experts(experts):
    """With vLLM's filter, which leaves other ranks' experts unread, and without it.

    Weights alone: vLLM 0.32's CPU build loads such a model and cannot answer with it, merged or
    not.
    """
    family, merged = experts
    spread = {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "enforce_eager": True,
        "weights_only": True,
    }
    ours = {"model": str(family.task), "load_format": "enchtable", **spread}
    settings = [
        {"model": str(merged), **spread},
        ours,
        {**ours, "enable_ep_weight_filter": True},
    ]
    (offline, plain, filtered), printed = probe(settings, **TWO_CORES)
    assert len(offline["first"]["weights"]) == 2
    assert plain["first"] == offline["first"]
    assert filtered["first"] == offline["first"]
    first, second = offline["first"]["weights"]
    assert any(
        "w13_weight" in name for name in changed({"weights": [first]}, {"weights": [second]})
    )
    counts = re.findall(r"(\d+) merged, \d+ kept, (\d+) filtered", printed)
    # Of 34 tensors, 24 are experts' and each rank has half of them.
    assert sorted(counts) == sorted([("34", "0")] * 2 + [("22", "12")] * 2)


@pytest.mark.slow
@pytest.mark.supports("data parallelism (`-dp 2`)")
def test_each_engine_serves_the_offline_merge(family, merged):
    side_by_side = {"data_parallel_size": 2, "enforce_eager": True}
    ours = {"model": str(family.task), "load_format": "enchtable"}
    offline, _ = probe({"model": str(merged), **side_by_side}, ENGINES, **TWO_CORES)
    served, printed = probe({**ours, **side_by_side}, ENGINES, **TWO_CORES)
    assert len(served) == 2
    assert served == offline
    processes = set(re.findall(r"(pid=\d+)\).* safety vector merged: 8 merged", printed))
    assert len(processes) == 2
