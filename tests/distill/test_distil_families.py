"""Other architectures: biases, experts, stacks, tied heads; names are the checkpoint's own."""

import pytest
import torch
from architectures import tiny
from safetensors.torch import load_file

from enchtable_vllm.checkpoint import locate
from enchtable_vllm.distill.recipe import Recipe
from enchtable_vllm.distill.run import distil
from enchtable_vllm.vector import SafetyVector, in_scope


def tensors(folder):
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.parametrize(
    ("family", "scope", "mode"),
    [
        ("qwen2", "attention", "none"),
        ("qwen2", "all", "model"),
        ("mistral", "ffn", "module"),
        ("gemma3_text", "attention+ffn", "model"),
        ("gemma3_text", "all", "module"),
        ("qwen3_moe", "ffn", "none"),
        ("qwen3_moe", "attention+ffn", "module"),
        ("mixtral", "ffn", "model"),
        ("granitemoe", "ffn", "module"),
    ],
)
def test_a_vector_of_another_architecture(family, scope, mode, tokenizer, pairs, tmp_path):
    aligned = tiny(family, tmp_path / "aligned", vocab_size=512)
    tokenizer.save_pretrained(aligned)
    recipe = Recipe(
        scope=scope,
        linearize=mode,
        epochs=1,
        batch_size=4,
        gradient_accumulation=2,
        learning_rate=1e-3,
        eval_share=0.2,
        bf16=False,
    )
    kept = tmp_path / "surrogate"
    out = tmp_path / "vector"
    report = distil(locate(aligned), pairs, out, recipe, dtype="fp32", keep_surrogate=kept)
    first, second, vector = tensors(aligned), tensors(kept), SafetyVector.open(out)
    assert first.keys() == second.keys()
    for name in first:
        if name in vector.tensors:
            assert torch.equal(vector.read(name).values, first[name] - second[name])
        else:
            assert torch.equal(first[name], second[name])
            assert not in_scope(name, scope) or name in report.build.unchanged
    assert len(vector.tensors) > len(report.build.unchanged)
    assert report.linearity.actual[-1] < report.linearity.actual[0]
    assert report.linearity.logit_error > 0
