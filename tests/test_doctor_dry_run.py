"""``enchtable doctor --model``: what would be served, told from headers."""

import json
import shutil

import live
import models
import pytest

from enchtable_vllm.checkpoint import locate
from enchtable_vllm.doctor.dry_run import Question, dry_run
from enchtable_vllm.vector import build_vector


def last(*arguments):
    return dry_run(Question(*(str(a) if a is not None else None for a in arguments)))[-1]


def test_dry_run_with_a_plan_says_what_the_loader_says(family, damaged):
    finding = last(family.task)
    assert finding.status == "ok"
    assert "merge 8 and keep 13 tensors (13: not in the safety vector)" in finding.found
    assert "beta 0.5, scope attention" in finding.found
    assert last(family.task, None, None, family.plan).status == "ok"
    wrong = last(family.base, family.vector, None, family.plan)
    assert wrong.status == "fail"
    assert wrong.cause.startswith("MismatchError: expected the task model that the plan was made")
    (damaged.vector / "safety_vector.json").write_text("{}")
    assert last(damaged.task).cause.startswith("SafetyVectorError: expected format version 1")


def test_dry_run_without_a_plan_classifies(family, tmp_path):
    ok = last(family.task, family.vector, family.base)
    assert ok.status == "ok"
    assert ok.found.startswith("a plan would merge 8 and keep 13 tensors")
    untold = last(family.base, family.vector)
    assert (untold.status, "--base-model" in untold.cure) == ("warn", True)
    other = models.tiny_llama(tmp_path / "other", vocabulary=1024)
    surrogate = models.perturbed(other, tmp_path / "s", scale=1e-2, seed=3)
    build_vector(locate(other), locate(surrogate), tmp_path / "vector", scope="all")
    refused = last(family.base, tmp_path / "vector", family.base)
    assert refused.cause.startswith("MismatchError: expected a base model, a fine-tune of it")


def test_dry_run_of_a_model_alone(family, tmp_path):
    model, scopes = dry_run(Question(str(family.base)))
    assert model.found == "LlamaForCausalLM, 21 tensors (21 BF16)"
    assert "attention 8, ffn 6, attention+ffn 14, all 21" in scopes.found
    assert scopes.status == "warn"
    shutil.copytree(family.base, tmp_path / "quantised")
    config = json.loads((family.base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    refused = last(tmp_path / "quantised")
    assert refused.status == "fail"
    assert "quantization method 'awq'" in refused.cause


def test_dry_run_of_a_root_is_what_a_server_takes_from_it(family, tmp_path):
    """The plan beside the model is not read there: each vector has its own for the model."""
    root = live.make_root(family, tmp_path)
    (root.path / "lost+found").mkdir()
    _, *found = dry_run(Question(str(family.task), vector_root=str(root.path)))
    by_name = {finding.name: finding for finding in found}
    unplanned = by_name["dry run, 'sv-unplanned'"]
    assert unplanned.status == "warn"
    assert f"-o {root.plan('sv-unplanned')}" in unplanned.cure
    assert "dry run, 'lost+found'" not in by_name
    named = Question(str(family.task), "sv-unplanned", vector_root=str(root.path))
    assert dry_run(named)[1].status == "fail"
    assert by_name["dry run, 'sv-a'"].status == "ok"
    found = dry_run(Question(str(family.task), "sv-ffn", vector_root=str(root.path)))
    assert (found[1].status, "scope ffn" in found[1].found) == ("ok", True)
    computed = Question(str(family.task), "sv-unplanned", str(family.base), None, str(root.path))
    assert dry_run(computed)[1].found.startswith("a plan would merge 8")
    missing = dry_run(Question(str(family.task), "@current", vector_root=str(root.path)))[1]
    assert "current.json" in missing.cause
    without = dry_run(Question(str(family.task), "@none", vector_root=str(root.path)))[1]
    assert "without a vector" in without.found


@pytest.mark.parametrize("model", ["~nosuchuser/x", "/" + "x" * 300, "below/no/permission"])
def test_dry_run_of_what_is_no_folder_is_a_finding(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (finding,) = dry_run(Question(model))
    assert (finding.status, finding.name) == ("fail", "dry run")


def test_dry_run_reads_no_tensor_whole_and_downloads_nothing(family, monkeypatch):
    def fail(*_):
        raise AssertionError("read")

    monkeypatch.setattr("enchtable_vllm.vector.SafetyVector.read", fail)
    assert last(family.task).status == "ok"  # the fingerprint samples a mapped file
    monkeypatch.setattr("enchtable_vllm.checkpoint.Checkpoint.read", fail)
    assert last(family.task, family.vector, family.base).status == "ok"
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.repo_info", fail)
    absent = last("org/absent")
    assert absent.status == "fail"
    assert "hf download org/absent" in absent.cure
    for vector in (last(family.task, "org/absent", family.base), last(family.base, "org/absent")):
        assert "hf download org/absent" in vector.cure
