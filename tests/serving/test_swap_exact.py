"""What is served after a swap is, bit for bit, what a fresh load of that vector serves.

Weights read back through vLLM's own packed layers on every rank, tokens and logprobs, against
plain vLLM on what ``enchtable merge`` writes. The ranks are told what the API server tells them.
"""

import shutil

import live
import models
import pytest
from test_features import adapter
from vllm_runs import ONE_PROCESS, changed, probe

from enchtable_vllm.checkpoint import Checkpoint, Location, sampled_fingerprint
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.vector import SafetyVector

NAMES = ("sv-a", "sv-b", "sv-ffn", "sv-q")
#: Back and forth, to another scope and back, to a part of a fused group, to none and back.
WALK = ["sv-b", "sv-a", "sv-ffn", "sv-q", "@none", "sv-b"]


@pytest.fixture(scope="module")
def merged(root, tmp_path_factory):
    """Name → the checkpoint that `enchtable merge` writes with that vector."""
    folder = tmp_path_factory.mktemp("offline")
    made = {}
    for name in NAMES:
        resolved = resolve_plan(*read_plan(root.plan(name)))
        vector = SafetyVector.open(root.path / name)
        merge_checkpoint(Location(root.family.task), vector, resolved, folder / name)
        made[name] = str(folder / name)
    return made | {"@none": str(root.family.task)}


def ours(root, **more):
    extra = {"vector_root": str(root.path), "safety_vector": "sv-a"}
    model = {"model": str(root.family.task), "load_format": "enchtable"}
    return model | {"model_loader_extra_config": extra} | more


@pytest.fixture(scope="module")
def one_rank(root, merged, tmp_path_factory):
    lora = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "adapter": str(adapter(tmp_path_factory.mktemp("lora") / "adapter", root.family.task)),
        "enforce_eager": True,
    }
    settings = {name: {"model": merged[name], "enforce_eager": True} for name in merged}
    settings |= {
        "another": ours(root, enforce_eager=True, swaps=["@none"], another=str(root.family.base)),
        "eager": ours(root, enforce_eager=True, swaps=WALK, reload=True),
        "sv-b with lora": {"model": merged["sv-b"], **lora},
        "sv-a with lora": {"model": merged["sv-a"], **lora},
        "lora": ours(root, swaps=["sv-b", "sv-a"], **lora),
        "sv-b compiled": {"model": merged["sv-b"]},
        "sv-a compiled": {"model": merged["sv-a"]},
        "compiled": ours(root, swaps=["sv-b", "sv-a"]),
    }
    results, _ = probe(list(settings.values()), **ONE_PROCESS)
    return dict(zip(settings, results, strict=True))


def test_the_vectors_differ_where_they_should(one_rank):
    """Else the tests below would prove nothing."""
    served = {name: one_rank[name]["first"] for name in (*NAMES, "@none")}
    tokens = {str(found["tokens"]) + str(found["logprobs"]) for found in served.values()}
    assert len(tokens) == len(served)
    attention = changed(served["sv-a"], served["sv-b"])
    assert attention
    assert all("self_attn" in name for name in attention)
    assert all("mlp" in name for name in changed(served["@none"], served["sv-ffn"]))
    assert all("qkv_proj" in name for name in changed(served["@none"], served["sv-q"]))


@pytest.mark.supports("swapping without a restart")
def test_each_step_of_a_walk_equals_a_fresh_load(one_rank):
    walked = one_rank["eager"]
    assert walked["first"] == one_rank["sv-a"]["first"]
    for name, seen in zip(WALK, walked["swapped"], strict=True):
        assert seen == one_rank[name]["first"], name


def test_a_stock_reload_keeps_what_was_swapped_in(one_rank):
    """vLLM makes a new loader for it, from the config that the server was started with."""
    assert one_rank["eager"]["reloaded"] == one_rank[WALK[-1]]["first"]


def test_a_reload_of_another_task_model_is_refused_without_a_vector_too(one_rank):
    """A later swap would put the first one's tensors into it."""
    seen = one_rank["another"]
    assert seen["another"].startswith("MismatchError: ")
    assert "expected the task model that is served" in seen["another"]
    assert seen["afterwards"] == seen["swapped"][-1] == one_rank["@none"]["first"]


@pytest.mark.supports("swapping with LoRA adapters loaded")
def test_with_an_adapter_loaded(one_rank):
    after_b, after_a = one_rank["lora"]["swapped"]
    assert after_b == one_rank["sv-b with lora"]["first"]
    assert after_a == one_rank["sv-a with lora"]["first"] == one_rank["lora"]["first"]
    assert after_b["adapter"] != after_a["adapter"]


@pytest.mark.supports("swapping a compiled model")
def test_compiled(one_rank):
    after_b, after_a = one_rank["compiled"]["swapped"]
    assert after_b == one_rank["sv-b compiled"]["first"]
    assert after_a == one_rank["sv-a compiled"]["first"] == one_rank["compiled"]["first"]


@pytest.mark.supports("swapping a head that is tied to its embedding")
def test_a_head_tied_to_its_embedding(tmp_path):
    """The CPU build packs the one weight twice, and a reload knows of one of the two."""
    aligned = models.tiny_llama(tmp_path / "aligned", tied=True)
    family = models.make_family(aligned, tmp_path, scope="all")
    root = live.Root(tmp_path / "root", family, sampled_fingerprint(Checkpoint(family.task)))
    shutil.copytree(family.vector, root.path / "sv-a")
    live.add_plan(root, "sv-a")
    resolved = resolve_plan(*read_plan(root.plan("sv-a")))
    assert "model.embed_tokens.weight" in resolved.coefficients
    vector = SafetyVector.open(root.path / "sv-a")
    merge_checkpoint(Location(family.task), vector, resolved, tmp_path / "merged")
    # In fp32, which every CPU packs.
    packed = {"enforce_eager": True, "dtype": "float32"}
    settings = [
        {"model": str(family.task), **packed},
        {"model": str(tmp_path / "merged"), **packed},
        ours(root, swaps=["@none", "sv-a"], **packed),
    ]
    (plain, merged, walked), _ = probe(settings, **ONE_PROCESS)
    assert plain["first"]["logprobs"] != merged["first"]["logprobs"]
    assert walked["first"] == merged["first"]
    assert walked["swapped"] == [plain["first"], merged["first"]]


@pytest.mark.slow  # a rank that fails is in `test_swap_faults`, on two ranks too
@pytest.mark.supports("swapping under tensor parallelism")
def test_two_ranks(root, merged):
    two = {"tensor_parallel_size": 2, "enforce_eager": True}
    settings = [
        {"model": merged["sv-a"], **two},
        {"model": merged["sv-b"], **two},
        ours(root, swaps=["sv-b", "sv-a"], **two),
    ]
    results, _ = probe(settings, VLLM_CPU_OMP_THREADS_BIND="0|1")
    plain_a, plain_b, walked = results
    assert len(walked["first"]["weights"]) == 2
    assert walked["swapped"] == [plain_b["first"], plain_a["first"]]
    assert walked["first"] == plain_a["first"] != plain_b["first"]
