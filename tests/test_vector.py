"""Building safety vectors, and refusing damaged ones."""

import json
import shutil

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from enchtable_vllm.checkpoint import locate, tensor_digest
from enchtable_vllm.errors import (
    MismatchError,
    NonFiniteError,
    QuantizedCheckpointError,
    SafetyVectorError,
)
from enchtable_vllm.vector import Delta, SafetyVector, build_vector, in_scope, narrows

Q = "model.layers.0.self_attn.q_proj.weight"


def build(family, out, **options):
    return build_vector(locate(family.aligned), locate(family.surrogate), out, **options)


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_vector_is_aligned_minus_surrogate(family, tmp_path, dtype, torch_dtype):
    report = build(family, tmp_path / "v", dtype=dtype)
    aligned = load_file(family.aligned / "model.safetensors")
    surrogate = load_file(family.surrogate / "model.safetensors")
    vector = SafetyVector.open(tmp_path / "v")
    assert set(vector.tensors) == {n for n in aligned if "_proj" in n and "self_attn" in n}
    for name, entry in vector.tensors.items():
        expected = (aligned[name] - surrogate[name]).to(torch_dtype)
        delta = vector.read(name)
        assert delta.scales is None
        assert torch.equal(delta.values, expected)
        assert entry.norm == pytest.approx(float(expected.double().norm()), rel=1e-12)
    total = sum(t.norm**2 for t in vector.tensors.values()) ** 0.5
    assert vector.manifest.norm == pytest.approx(total, rel=1e-12)
    assert report.warnings == []
    assert vector.manifest.architecture == "LlamaForCausalLM"


def test_int8_halves_the_bytes_at_a_relative_error_of_half_a_per_cent(family, tmp_path):
    build(family, tmp_path / "fp32", dtype="fp32")
    build(family, tmp_path / "int8", dtype="int8")
    exact, vector = SafetyVector.open(tmp_path / "fp32"), SafetyVector.open(tmp_path / "int8")
    assert set(vector.tensors) == set(exact.tensors)
    for name, entry in vector.tensors.items():
        delta, truth = vector.read(name), exact.read(name).float()
        rows, columns = truth.shape
        assert delta.values.dtype == torch.int8
        assert delta.scales.shape == (rows, columns // 64)
        blocks = truth.view(rows, -1, 64)
        assert torch.equal(delta.scales, blocks.abs().amax(-1) / 127)
        error = (delta.float() - truth).view_as(blocks).abs()
        assert bool((error <= delta.scales[..., None] * 0.5001).all())  # half a step
        assert 1e-3 < float((delta.float() - truth).norm() / truth.norm()) < 1e-2
        assert entry.norm == pytest.approx(float(delta.float().double().norm()), rel=1e-12)
    size = (tmp_path / "int8" / "safety_vector.safetensors").stat().st_size
    assert size / (tmp_path / "fp32" / "safety_vector.safetensors").stat().st_size < 0.28


@pytest.mark.parametrize("shape", [(), (1,), (5,), (130,), (3, 65), (2, 3, 64)], ids=str)
def test_int8_of_every_shape_survives_the_file(tmp_path, shape):
    """Odd sizes too: fp32 scales behind an odd number of bytes could not be read back."""
    generator = torch.Generator().manual_seed(0)
    names = ("a.weight", "b.weight", "c.weight")
    for folder in ("aligned", "surrogate"):
        tensors = {n: torch.randn(shape, generator=generator) * 1e-3 for n in names}
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    build_vector(
        locate(tmp_path / "aligned"), locate(tmp_path / "surrogate"), tmp_path / "v",
        scope="all", dtype="int8", max_shard_bytes=300,
    )  # fmt: skip
    vector = SafetyVector.open(tmp_path / "v")
    aligned = load_file(tmp_path / "aligned" / "model.safetensors")
    surrogate = load_file(tmp_path / "surrogate" / "model.safetensors")
    for name in names:
        truth, got = aligned[name] - surrogate[name], vector.read(name).float()
        assert got.shape == truth.shape
        assert float((got - truth).norm()) <= 1e-2 * float(truth.norm())
    for file in (tmp_path / "v").glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        starts = {n: 8 + length + entry["data_offsets"][0] for n, entry in header.items()}
        assert all(at % 4 == 0 for n, at in starts.items() if n.endswith(".scale"))


def test_int8_of_zeros_and_of_the_smallest_numbers_is_finite():
    dense = torch.zeros(2, 128)
    dense[1, 64:] = 1e-45
    delta = Delta.quantized(dense)
    assert bool(torch.isfinite(delta.scales).all())
    assert torch.equal(delta.float()[0], dense[0])
    assert float((delta.float() - dense).abs().max()) <= 2e-45


def test_int8_refuses_names_that_its_scales_would_take(tmp_path):
    for folder, value in (("aligned", 0.0), ("surrogate", 1.0)):
        (tmp_path / folder).mkdir()
        tensors = {"a": torch.full((4,), value), "a.scale": torch.full((4,), value)}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    with pytest.raises(MismatchError, match=r"no name that ends in '.scale'"):
        build_vector(
            locate(tmp_path / "aligned"), locate(tmp_path / "surrogate"), tmp_path / "v",
            scope="all", dtype="int8",
        )  # fmt: skip
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-3])
def test_scales_that_are_not_finite_or_negative_are_refused(family, tmp_path, edit_json, bad):
    """Even where the manifest vouches for them: a negative one would take safety away."""
    build(family, tmp_path / "v", dtype="int8")
    path = tmp_path / "v" / "safety_vector.safetensors"
    tensors = load_file(path)
    tensors[Q + ".scale"][0, 0] = bad
    save_file(tensors, path)
    manifest = tmp_path / "v" / "safety_vector.json"
    digest = tensor_digest(tensors[Q + ".scale"])
    edit_json(manifest, "tensors", Q, "scale_digest", value=digest)
    with pytest.raises(SafetyVectorError, match="finite and not negative"):
        SafetyVector.open(tmp_path / "v").read(Q)


def test_every_byte_of_the_scales_is_vouched_for(family, tmp_path):
    build(family, tmp_path / "v", dtype="int8")
    before = SafetyVector.open(tmp_path / "v").fingerprint
    path = tmp_path / "v" / "safety_vector.safetensors"
    tensors = load_file(path)
    tensors[Q + ".scale"] *= 2
    save_file(tensors, path)
    with pytest.raises(SafetyVectorError, match=r"q_proj.weight.scale': expected content blake3"):
        SafetyVector.open(tmp_path / "v").read(Q)
    build(family, tmp_path / "other", dtype="bf16")
    assert SafetyVector.open(tmp_path / "other").fingerprint != before


def test_a_large_vector_is_sharded_and_reads_the_same(family, tmp_path):
    build(family, tmp_path / "whole")
    build(family, tmp_path / "sharded", max_shard_bytes=200_000)
    assert len(list((tmp_path / "sharded").glob("safety_vector-*-of-*.safetensors"))) > 2
    whole, sharded = SafetyVector.open(tmp_path / "whole"), SafetyVector.open(tmp_path / "sharded")
    assert whole.fingerprint == sharded.fingerprint
    assert torch.equal(whole.read(Q).values, sharded.read(Q).values)


def test_building_holds_a_few_tensors_not_a_model(family, tmp_path, tensors_alive):
    build(family, tmp_path / "v", scope="all")
    assert 2 <= tensors_alive.most <= 4


def with_tensor(model, folder, name):
    """A copy with one more."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[Q].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("block", ["mtp.layers.0", "model.layers.2"])
def test_layers_that_transformers_does_not_keep_are_left_out_and_said(family, tmp_path, block):
    """Those that predict several tokens ahead, beside the model's own or behind its last."""
    name = f"{block}.self_attn.q_proj.weight"
    aligned = with_tensor(family.aligned, tmp_path / "aligned", name)
    report = build_vector(locate(aligned), locate(family.surrogate), tmp_path / "v")
    assert set(SafetyVector.open(tmp_path / "v").tensors) == {
        n for n in load_file(family.aligned / "model.safetensors") if "self_attn" in n
    }
    (warning,) = report.warnings
    assert f"'{block}'" in warning
    both = with_tensor(family.surrogate, tmp_path / "surrogate", name)
    assert build_vector(locate(aligned), locate(both), tmp_path / "w").warnings == []
    assert name in SafetyVector.open(tmp_path / "w").tensors


def test_a_layer_of_the_model_itself_may_not_be_gone(family, tmp_path):
    surrogate = tmp_path / "surrogate"
    shutil.copytree(family.surrogate, surrogate)
    tensors = load_file(surrogate / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers.1." not in name}
    save_file(kept, surrogate / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"layers\.1\..* is only in the aligned model"):
        build_vector(locate(family.aligned), locate(surrogate), tmp_path / "v")


def test_scope_all_leaves_out_what_did_not_change(family, tmp_path):
    report = build(family, tmp_path / "v", scope="all")
    assert all("self_attn" in name for name in report.manifest.tensors)
    assert "model.embed_tokens.weight" in report.unchanged


def test_sixteen_bit_inputs_warn_with_the_share_of_zeros(family, tmp_path):
    """A change of 1e-5 on weights of 0.02 mostly disappears in bf16, and the report says so."""
    aligned = models.perturbed(family.base, tmp_path / "a", scale=0.0, seed=0)
    surrogate = models.perturbed(family.base, tmp_path / "s", scale=1e-5, seed=3, only="self_attn")
    report = build_vector(locate(aligned), locate(surrogate), tmp_path / "v")
    assert report.manifest.zero_share > 0.5
    assert f"{report.manifest.zero_share:.1%}" in report.warnings[0]
    assert "fp32" in report.warnings[0]


def test_card_names_the_models_and_the_danger(family, tmp_path):
    build(family, tmp_path / "v")
    card = (tmp_path / "v" / "README.md").read_text()
    assert "Handle it like the surrogate" in card
    assert "aligned" in card
    assert card.startswith("---\n")


def test_models_that_do_not_belong_together_are_refused_with_all_faults(family, tmp_path):
    other = models.tiny_llama(tmp_path / "other", vocabulary=512, seed=1)
    tensors = load_file(other / "model.safetensors")
    for layer in range(2):
        del tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
        tensors[f"model.layers.{layer}.self_attn.k_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(MismatchError, match="4 fault") as raised:
        build_vector(locate(family.aligned), locate(other), tmp_path / "v")
    assert "only in the aligned model" in str(raised.value)
    assert not (tmp_path / "v").exists()


def test_identical_and_quantised_models_are_refused(family, damaged, tmp_path):
    with pytest.raises(MismatchError, match="identical tensors"):
        build_vector(locate(family.aligned), locate(family.aligned), tmp_path / "v")
    (damaged.surrogate / "config.json").write_text(
        '{"quantization_config": {"quant_method": "gptq"}}'
    )
    with pytest.raises(QuantizedCheckpointError, match="gptq"):
        build(damaged, tmp_path / "v")


def test_a_difference_that_is_not_finite_leaves_nothing_behind(damaged, tmp_path):
    tensors = load_file(damaged.surrogate / "model.safetensors")
    tensors[Q][0, 0] = float("inf")
    save_file(tensors, damaged.surrogate / "model.safetensors")
    with pytest.raises(NonFiniteError, match="q_proj"):
        build(damaged, tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_bytes_handed_out_are_not_the_files(damaged):
    """What was verified cannot change under the merge, even if the file does."""
    vector = SafetyVector.open(damaged.vector)
    delta = vector.read(Q).values
    before = delta.clone()
    path = damaged.vector / "safety_vector.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
        file.seek(0)
    assert torch.equal(delta, before)


def test_fingerprint_follows_content_not_place(damaged, tmp_path):
    moved = shutil.copytree(damaged.vector, tmp_path / "elsewhere")
    assert SafetyVector.open(moved).fingerprint == SafetyVector.open(damaged.vector).fingerprint
    manifest = moved / "safety_vector.json"
    document = json.loads(manifest.read_text())
    document["tensors"][Q]["digest"] = "blake3:" + "0" * 64
    manifest.write_text(json.dumps(document))
    assert SafetyVector.open(moved).fingerprint != SafetyVector.open(damaged.vector).fingerprint


@pytest.mark.parametrize(
    ("name", "attention", "ffn"),
    [
        ("model.layers.3.self_attn.q_proj.weight", True, False),
        ("model.layers.3.self_attn.q_proj.bias", True, False),
        ("model.layers.3.self_attn.q_norm.weight", False, False),
        ("model.layers.3.mlp.gate_proj.weight", False, True),
        ("model.layers.3.mlp.experts.7.up_proj.weight", False, True),
        ("model.layers.3.block_sparse_moe.gate.weight", False, True),
        ("model.layers.3.post_attention_layernorm.weight", False, False),
        ("transformer.h.0.attn.c_attn.weight", True, False),
        ("transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight", True, False),
        ("transformer.blocks.0.norm_attn_norm.norm_1.weight", False, False),
        ("model.embed_tokens.weight", False, False),
        ("lm_head.weight", False, False),
    ],
)
def test_scopes(name, attention, ffn):
    assert in_scope(name, "attention") == attention
    assert in_scope(name, "ffn") == ffn
    assert in_scope(name, "attention+ffn") == (attention or ffn)
    assert in_scope(name, "all")


def test_narrowing():
    assert narrows("attention", "attention+ffn")
    assert narrows("attention", "all")
    assert narrows("all", "all")
    assert not narrows("all", "attention+ffn")
    assert not narrows("ffn", "attention")
