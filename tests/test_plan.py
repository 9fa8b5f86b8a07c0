"""Merge plans: the specification's numbers, the same bytes every time, and nothing believed."""

import json
import math
import subprocess
import sys

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_interference import oracle

from enchtable_vllm.checkpoint import Location, locate
from enchtable_vllm.errors import (
    ConfigError,
    MergePlanError,
    MismatchError,
)
from enchtable_vllm.plan import PlanOptions, compute_plan, read_plan, resolve_plan
from enchtable_vllm.plan.resolve import norm_scale
from enchtable_vllm.plan.summary import module_kind, summarize
from enchtable_vllm.vector import SafetyVector, build_vector, in_scope

Q = "model.layers.0.self_attn.q_proj.weight"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def resolved(path, **options):
    return resolve_plan(*read_plan(path), **options)


def test_numbers_are_the_specifications(family):
    """Norm scale, interference and coefficients computed again, dense and in float64."""
    plan, _ = read_plan(family.plan)
    task, base = tensors_of(family.task), tensors_of(family.base)
    safety = load_file(family.vector / "safety_vector.safetensors")
    deltas = {name: task[name].double() - base[name].double() for name in task}
    task_norm = math.sqrt(sum(float(d.square().sum()) for d in deltas.values()))
    safety_norm = math.sqrt(sum(float(s.double().square().sum()) for s in safety.values()))
    n = plan.beta * task_norm / safety_norm
    assert plan.norm_scale == pytest.approx(n, rel=1e-9)
    assert set(plan.merged) == set(safety)
    for name, tensor in plan.merged.items():
        expected = oracle(task[name].float() - base[name].float(), safety[name].float(), n)
        assert tensor.attenuation[0] == pytest.approx(expected, abs=1e-4)
        assert 0.05 < expected < 0.999, "a case that could not fail"
        assert tensor.coefficient[0] == pytest.approx(n * expected, rel=2e-3)


def test_every_run_writes_the_same_bytes(family):
    """Here, and in another process."""
    first = family.plan.read_text()
    code = (
        "import sys, models; from pathlib import Path; p = [Path(x) for x in sys.argv[1:]]; "
        "sys.stdout.write(models.plan_for(*p, beta=0.5).to_json())"
    )
    paths = [str(family.task), str(family.base), str(family.vector)]
    again = subprocess.run(
        [sys.executable, "-c", code, *paths],
        check=True, capture_output=True, text=True, cwd="tests",
    )  # fmt: skip
    assert again.stdout == first


def test_plan_names_no_path_of_this_machine(family, tmp_path):
    assert str(family.task.parent) not in family.plan.read_text()
    elsewhere = tmp_path / "v"
    build_vector(locate(family.aligned), locate(family.surrogate), elsewhere)
    text = models.plan_for(family.task, family.base, elsewhere).to_json()
    assert str(tmp_path) not in text


def test_another_beta_is_what_planning_with_it_gives(family):
    planned = models.plan_for(family.task, family.base, family.vector, beta=2.0)
    derived = resolved(family.plan, beta=2.0)
    assert derived.norm_scale == pytest.approx(planned.norm_scale, rel=1e-12)
    for name, tensor in planned.merged.items():
        assert derived.coefficients[name] == pytest.approx(tensor.coefficient, rel=1e-12)


def test_a_narrower_scope_is_what_planning_with_it_gives(family, tmp_path):
    whole = models.make_family(family.aligned, tmp_path, scope="all")
    for scope in ("attention", "ffn", "attention+ffn"):
        planned = models.plan_for(whole.task, whole.base, whole.vector, beta=0.5, scope=scope)
        derived = resolved(whole.plan, scope=scope)
        assert derived.coefficients.keys() == planned.merged.keys()
        assert all(in_scope(name, scope) for name in derived.coefficients)
        for name, tensor in planned.merged.items():
            assert derived.coefficients[name] == pytest.approx(tensor.coefficient, rel=1e-12)
    with pytest.raises(ConfigError, match="enchtable plan --scope"):
        resolved(family.plan, scope="ffn")


def test_every_kind_of_scope_all_tensor(family, tmp_path):
    """Norms (1-D) take attenuation 1, embeddings are matrices."""
    aligned = family.aligned
    surrogate = tensors_of(aligned)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in surrogate.items():
        surrogate[name] = tensor + torch.randn(tensor.shape, generator=generator) * 1e-3
    models.perturbed(aligned, tmp_path / "s", scale=0, seed=0)
    save_file(surrogate, tmp_path / "s" / "model.safetensors", metadata={"format": "pt"})
    build_vector(locate(aligned), locate(tmp_path / "s"), tmp_path / "v", scope="all")
    plan = models.plan_for(family.task, family.base, tmp_path / "v")
    assert len(plan.merged) == len(plan.tensors)
    assert plan.tensors["model.norm.weight"].attenuation == (1.0,)
    assert plan.tensors["model.embed_tokens.weight"].attenuation[0] < 1.0


def test_stack_of_experts_is_so_many_matrices(family, tmp_path):
    """A 3-D tensor gives each slice the number that the slice alone would get."""
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    generator = torch.Generator().manual_seed(0)
    folders = {}
    for kind, noise in (("aligned", 0.0), ("surrogate", 1e-3), ("task", 2e-3)):
        models.perturbed(family.aligned, tmp_path / kind, scale=0.0, seed=0)
        tensors = tensors_of(tmp_path / kind)
        tensors[stack] = torch.ones(3, 20, 30) + torch.randn(3, 20, 30, generator=generator) * noise
        tensors = {n: tensors[n] for n in (stack, "model.norm.weight")}
        save_file(tensors, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        folders[kind] = tmp_path / kind
    build_vector(
        locate(folders["aligned"]), locate(folders["surrogate"]), tmp_path / "v", scope="ffn"
    )
    plan = models.plan_for(folders["task"], folders["aligned"], tmp_path / "v")
    task, base = tensors_of(folders["task"])[stack], tensors_of(folders["aligned"])[stack]
    safety = SafetyVector.open(tmp_path / "v").read(stack).float()
    found = plan.tensors[stack].attenuation
    assert len(found) == 3
    for i in range(3):
        expected = oracle(task[i] - base[i], safety[i], plan.norm_scale)
        assert found[i] == pytest.approx(expected, abs=1e-4)


def extend_vocabulary(folder, rows=8):
    tensors = tensors_of(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:rows]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_extended_vocabulary_is_kept_and_left_out_of_the_norm(damaged, tmp_path):
    surrogate = models.perturbed(damaged.aligned, tmp_path / "s", scale=1e-3, seed=4)
    build_vector(locate(damaged.aligned), locate(surrogate), tmp_path / "v", scope="all")
    before = models.plan_for(damaged.task, damaged.base, tmp_path / "v")
    extend_vocabulary(damaged.task)
    after = models.plan_for(damaged.task, damaged.base, tmp_path / "v")
    kept = after.tensors["lm_head.weight"]
    assert kept.action == "keep"
    assert kept.reason == "[520, 256] in the task model, [512, 256] in the base model"
    assert after.task_norm < before.task_norm


def test_tensors_on_one_side_only_are_listed(damaged):
    task, base = tensors_of(damaged.task), tensors_of(damaged.base)
    task["model.extra.weight"] = torch.ones(2, 2)
    base["model.gone.weight"] = torch.ones(2, 2)
    save_file(task, damaged.task / "model.safetensors")
    save_file(base, damaged.base / "model.safetensors")
    plan = models.plan_for(damaged.task, damaged.base, damaged.vector)
    assert plan.tensors["model.extra.weight"].reason == "not in the safety vector"
    assert plan.unused == {"model.gone.weight": "only in the base model"}


def test_tied_embeddings(tmp_path, edit_json):
    """An untied vector against a tied fine-tune: the head is the embedding, and listed so."""
    aligned = models.tiny_llama(tmp_path / "aligned", tied=True)
    family = models.make_family(aligned, tmp_path)
    assert "lm_head.weight" not in tensors_of(family.task)
    for kind in ("aligned", "surrogate"):
        folder = tmp_path / kind
        tensors = tensors_of(folder)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (kind == "surrogate")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        edit_json(folder / "config.json", "tie_word_embeddings", value=False)
    build_vector(
        locate(tmp_path / "aligned"), locate(tmp_path / "surrogate"), tmp_path / "v", scope="all"
    )
    plan = models.plan_for(family.task, family.base, tmp_path / "v")
    assert plan.unused == {"lm_head.weight": "the task model ties it to its embedding"}


def test_vector_tensor_without_a_home_is_an_error(damaged):
    tensors = tensors_of(damaged.task)
    del tensors[Q]
    save_file(tensors, damaged.task / "model.safetensors")
    with pytest.raises(MismatchError, match="is in the vector, not in the task model"):
        models.plan_for(damaged.task, damaged.base, damaged.vector)


def test_shape_mismatch_is_an_error(damaged):
    tensors = tensors_of(damaged.base)
    tensors[Q] = tensors[Q][:10].contiguous()
    save_file(tensors, damaged.base / "model.safetensors")
    with pytest.raises(MismatchError, match=r"q_proj.*\[10, 256\] in the base model"):
        models.plan_for(damaged.task, damaged.base, damaged.vector)


def test_unrelated_and_identical_base_models_are_refused(family, tmp_path):
    other = models.tiny_llama(tmp_path / "other", seed=9)
    with pytest.raises(MismatchError, match="unrelated"):
        models.plan_for(family.task, other, family.vector)
    with pytest.raises(MismatchError, match="identical weights"):
        models.plan_for(family.task, family.task, family.vector)


def test_a_vector_of_another_base_is_refused_whatever_its_shapes(family, tmp_path):
    other = models.make_family(models.tiny_llama(tmp_path / "other", seed=5), tmp_path)
    with pytest.raises(MismatchError, match=r"8 fault.*other weights.*--allow-other-base"):
        models.plan_for(family.task, family.base, other.vector)
    models.plan_for(family.task, family.base, other.vector, allow_other_base=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_same_base_in_another_precision_is_the_same_base(family, tmp_path, dtype):
    base = models.perturbed(family.aligned, tmp_path / "b", scale=0.0, seed=0, dtype=dtype)
    models.plan_for(family.task, base, family.vector)


def test_a_vector_that_is_zero_and_a_beta_that_overflows_are_refused(family, damaged, edit_json):
    with pytest.raises(MergePlanError, match="nor huge"):
        models.plan_for(family.task, family.base, family.vector, beta=1e308)
    names = json.loads(damaged.plan.read_text())["tensors"]
    for name, tensor in names.items():
        if tensor["action"] == "merge":
            edit_json(damaged.plan, "tensors", name, "safety_norm", value=0.0)
    with pytest.raises(MergePlanError, match="not zero"):
        resolved(damaged.plan)


def test_a_norm_scale_that_vanishes_is_refused():
    with pytest.raises(MergePlanError, match="neither tiny"):
        norm_scale(5e-324, 1e-3, [1.0])
    assert norm_scale(1.0, 1.0, [1e200, 1e200])[1] == pytest.approx(math.sqrt(2) * 1e200)


def test_a_tensor_that_shrank_or_is_no_vocabulary_is_not_an_extension(damaged):
    tensors = tensors_of(damaged.task)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, damaged.task / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"o_proj.*\[264, 256\] in the task model"):
        models.plan_for(damaged.task, damaged.base, damaged.vector)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_bad_beta_is_refused(family, beta):
    with pytest.raises(ConfigError, match="beta"):
        PlanOptions(beta=beta)
    with pytest.raises(ConfigError, match="beta"):
        resolved(family.plan, beta=beta)


@pytest.mark.parametrize("gamma", [0.0, 1.1, math.nan])
def test_bad_rank_fraction_is_refused(gamma):
    with pytest.raises(ConfigError, match="rank fraction"):
        PlanOptions(rank_fraction=gamma)


def test_plan_has_a_line_for_each_tensor(family):
    text = family.plan.read_text()
    plan, _ = read_plan(family.plan)
    assert plan.to_json() == text
    lines = [line for line in text.splitlines() if '"action"' in line]
    assert len(lines) == len(plan.tensors)
    assert json.loads(text)["tensors"][Q]["rungs"]


def test_planning_holds_a_few_tensors_not_a_model(family, tensors_alive):
    models.plan_for(family.task, family.base, family.vector, jobs=1)
    assert 2 <= tensors_alive.most <= 5


def test_expected_retained_share_is_what_the_merge_reports(family, tmp_path):
    from enchtable_vllm.merge import merge_checkpoint

    plan, digest = read_plan(family.plan)
    vector = SafetyVector.open(family.vector)
    report = merge_checkpoint(
        Location(family.task), vector, resolve_plan(plan, digest), tmp_path / "out"
    )
    assert report.total.retained_share == pytest.approx(plan.retained_share, abs=1e-6)


def test_summary_by_kind(family):
    plan, _ = read_plan(family.plan)
    kinds = summarize(plan)
    assert [k.kind for k in kinds] == [f"self_attn.{p}_proj" for p in "koqv"]
    for kind in kinds:
        assert kind.matrices == 2
        assert kind.attenuation == tuple(sorted(kind.attenuation))
    assert module_kind("model.layers.1.mlp.experts.3.up_proj.weight") == "mlp.experts.up_proj"
    assert module_kind("model.embed_tokens.weight") == "model.embed_tokens.weight"


@pytest.mark.gpu
def test_plan_on_a_gpu_agrees(family):
    vector = SafetyVector.open(family.vector)
    options = PlanOptions(beta=0.5, device="cuda")
    made = compute_plan(Location(family.task), Location(family.base), vector, options)
    plan, _ = read_plan(family.plan)
    for name, tensor in plan.merged.items():
        assert made.tensors[name].attenuation == pytest.approx(tensor.attenuation, abs=1e-4)
