"""Every architecture and way of storing a checkpoint: what is served is the offline merge.

A new one is a line in `MODELS` or `FILES`. All run after one start of vLLM. For each model it is
shown that the probe sees the merge: the digests differ in the merged tensors, and in no other.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import architectures
import models
import pytest
from vllm_runs import ONE_PROCESS, changed, merged_offline, probe

from enchtable_vllm.plan import read_plan


def as_is(folder: Path) -> None:
    """Leave a checkpoint as transformers wrote it."""


@dataclass(frozen=True)
class Case:
    """A model to serve.

    Attributes:
        model_type: transformers' name of the architecture.
        scope: What is merged.
        sizes: Further settings of its config.
        names: The aligned model's, where the whole family has other tensor names.
        store: How base and task model are stored.
        extend: What the task model has besides.
    """

    model_type: str
    scope: str
    sizes: dict = field(default_factory=dict)
    names: Callable = as_is
    store: Callable = as_is
    extend: Callable = as_is


SHARDED = {"max_shard_size": "300KB"}
TIED = {"tie_word_embeddings": True}
#: Each is also served unmerged, to show that the probe tells the difference.
MODELS = {
    "Llama, untied": Case("llama", "all"),
    "Llama, tied": Case("llama", "all", TIED),
    "Qwen2 (biases)": Case("qwen2", "all"),
    "Qwen3": Case("qwen3", "attention+ffn"),
    "Mistral": Case("mistral", "attention+ffn"),
    "Gemma 3 (text; tied)": Case("gemma3_text", "all"),
    "Qwen3-MoE (experts and router)": Case("qwen3_moe", "attention+ffn"),
    "Mixtral (experts and router)": Case("mixtral", "ffn"),
    "Granite-MoE (experts stored as 3-D stacks)": Case("granitemoe", "all"),
    "a tied head stored a second time": Case(
        "llama", "all", TIED, store=architectures.with_repeated_head
    ),
    "an extended vocabulary": Case("qwen2", "all", extend=architectures.with_added_tokens),
}
#: The same models in other files.
FILES = {
    "sharded safetensors": Case("llama", "attention+ffn", SHARDED),
    "`pytorch_model.bin`": Case("gemma3_text", "all", store=architectures.pickled),
    "sharded `.bin`": Case("llama", "all", store=partial(architectures.pickled, shards=2)),
    "`consolidated.safetensors` beside `model-*.safetensors`": Case(
        "mistral", "attention", SHARDED, store=architectures.consolidated
    ),
    "`consolidated.safetensors` alone": Case(
        "mistral", "attention+ffn", names=architectures.only_consolidated
    ),
}
CASES = MODELS | FILES
#: From a checkpoint's names to those of the parameters that vLLM packs them into.
_EXPERTS = ".experts.routed_experts."
_PACKED = [
    *((rf"\.{theirs}\.", f".{own}.") for own, theirs in architectures.MISTRAL.items()),
    (r"^layers\.", "model.layers."),
    (r"\.experts\.\d+\.(gate|up)_proj\.weight", f"{_EXPERTS}w13_weight"),
    (r"\.experts\.\d+\.down_proj\.weight", f"{_EXPERTS}w2_weight"),
    (r"\.input_linear\.weight", f"{_EXPERTS}w13_weight"),
    (r"\.output_linear\.weight", f"{_EXPERTS}w2_weight"),
    (r"\.router\.layer\.", ".gate."),
    (r"\.[qkv]_proj\.", ".qkv_proj."),
    (r"\.(gate|up)_proj\.", ".gate_up_proj."),
]


def packed(name):
    """The served parameter that holds a checkpoint's tensor."""
    for pattern, replacement in _PACKED:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    made = {}
    for i, (label, case) in enumerate(CASES.items()):
        own = folder / str(i)
        aligned = architectures.tiny(case.model_type, own / "aligned", **case.sizes)
        case.names(aligned)
        made[label] = models.make_family(
            aligned, own, scope=case.scope, norms=case.scope == "all", store=case.store,
            extend=case.extend,
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def served(families, tmp_path_factory):
    """What is served of each: merged offline, merged while loading, unmerged."""
    folder = tmp_path_factory.mktemp("merged")
    settings = {}
    for i, (label, family) in enumerate(families.items()):
        merged = merged_offline(family, folder / str(i))
        task = {"model": str(family.task), "enforce_eager": True}
        settings[label, "offline"] = {"model": str(merged), "enforce_eager": True}
        settings[label, "ours"] = {**task, "load_format": "enchtable"}
        if "experts" in label:
            settings[label, "ours"]["refuses_swaps"] = True
        if label in MODELS:
            settings[label, "unmerged"] = {**task, "weights_only": True}
    results, _ = probe(list(settings.values()), **ONE_PROCESS)
    found = {which: result["first"] for which, result in zip(settings, results, strict=True)}
    for which, result in zip(settings, results, strict=True):
        found |= {(which[0], key): result[key] for key in result if key != "first"}
    return found


@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=pytest.mark.supports(label)) for label in CASES]
)
def test_served_is_the_offline_merge(served, label):
    assert served[label, "ours"] == served[label, "offline"]


@pytest.mark.parametrize("label", MODELS)
def test_the_probe_sees_the_merge_and_nothing_else(served, families, label):
    plan, _ = read_plan(families[label].plan)
    expected = {packed(name) for name in plan.merged}
    assert changed(served[label, "unmerged"], served[label, "offline"]) == expected


@pytest.mark.parametrize("label", [label for label in CASES if "experts" in label])
def test_experts_that_the_cpu_does_not_give_back_are_not_swapped(served, label):
    refusal = served[label, "refused_swap"]
    assert (refusal["ok"], refusal["code"]) == (False, "not_swappable"), refusal
    assert "experts" in refusal["error"]["message"]
    assert served[label, "afterwards"] == served[label, "ours"]


def test_all_that_a_scope_means_is_merged(families):
    """The cases above merge what their labels say."""
    merged = {label: set(read_plan(family.plan)[0].merged) for label, family in families.items()}
    assert "model.layers.1.self_attn.q_proj.bias" in merged["Qwen2 (biases)"]
    assert "model.embed_tokens.weight" in merged["Gemma 3 (text; tied)"]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= merged["Llama, untied"]
    for label, router, expert in [
        ("Qwen3-MoE (experts and router)", "mlp.gate", "mlp.experts.3.up_proj"),
        ("Mixtral (experts and router)", "block_sparse_moe.gate", "block_sparse_moe.experts.3.w2"),
        (
            "Granite-MoE (experts stored as 3-D stacks)",
            "block_sparse_moe.router.layer",
            "block_sparse_moe.input_linear",
        ),
    ]:
        assert {f"model.layers.1.{part}.weight" for part in (router, expert)} <= merged[label]


def test_an_extended_vocabulary_is_kept_and_reported(families):
    plan, _ = read_plan(families["an extended vocabulary"].plan)
    reasons = {name: plan.tensors[name].reason for name in plan.tensors}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert reasons[name] == "[320, 128] in the task model, [256, 128] in the base model"
