"""The demo's training steps, on a tiny model: what they make, and that it is made once."""

import pytest
import torch
from safetensors.torch import load_file

from enchtable_vllm.demo import checkpoints
from enchtable_vllm.demo.data import Pair
from enchtable_vllm.vector import SafetyVector


@pytest.fixture
def taught():
    return [Pair(f"question {i}", "Sure, here is how. First,") for i in range(20)]


def test_the_vector_comes_from_the_aligned_models_attention(aligned, taught, tmp_path):
    vector, recipe = tmp_path / "safety-vector", checkpoints.Story().distil
    checkpoints.make_vector(aligned, vector, taught, recipe)
    opened = SafetyVector.open(vector)
    assert opened.manifest.scope == "attention"
    assert opened.manifest.recipe["data"]["training"] == 20
    assert opened.manifest.aligned.id == "tiny-aligned"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl", "safety-vector"]
    before = opened.fingerprint
    checkpoints.make_vector(aligned, vector, taught[:1], recipe)  # it is there
    assert SafetyVector.open(vector).fingerprint == before


def test_the_fine_tune_changes_the_decoders_matrices(aligned, taught, tmp_path):
    target = tmp_path / "task"
    checkpoints.make_checkpoint(aligned, target, taught, checkpoints.Story().task, torch.float32)
    first, second = (load_file(f / "model.safetensors") for f in (aligned, target))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {n for n in first if ".layers." in n and first[n].ndim == 2}
    assert [p.name for p in tmp_path.iterdir()] == ["task"]
