"""Every damage through every consumer: a clear refusal, and nothing left behind."""

import os

import pytest
from corpus import consumers, damaged_configs, damages
from models import copy_family

from enchtable_vllm.doctor.dry_run import Question, dry_run
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import prepare_model
from enchtable_vllm.vector import SafetyVector
from enchtable_vllm.vector.factor_files import verify_factors

WHAT_IS_SERVED = {"vector", "plan", "masks", "task"}


def parameters(chosen):
    for damage in chosen:
        marks = [pytest.mark.refuses(damage.proves)] if damage.proves else []
        form = "" if damage.form == "plain" else f"{damage.form}, "
        yield pytest.param(damage, id=f"{form}{damage.artefact}: {damage.name}", marks=marks)


@pytest.mark.timeout(60)  # a FIFO that is opened waits for ever
@pytest.mark.parametrize("damage", list(parameters(damages.DAMAGES)))
def test_refused_by_every_consumer(good, tmp_path, damage):
    reference = good[damage.form]
    family = copy_family(reference.family, tmp_path / "family")
    damage.apply(family)
    consumers.check_refused(reference, family, damage, tmp_path / "out")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "damage", list(parameters(d for d in damages.VECTOR_CONTENTS if d.artefact == "vector"))
)
def test_factoring_leaves_a_damaged_vector_as_it_was(good, tmp_path, damage):
    """'enchtable vector factor' writes into the vector's own folder, over what was there."""
    family = copy_family(good[damage.form].family, tmp_path / "family")
    damage.apply(family)
    before = consumers.files(family.vector)
    message, _ = consumers.refusal(lambda: consumers.command("vector", "factor", family.vector))
    if "read" in damage.blind | damage.other:
        assert message is None
        verify_factors(SafetyVector.open(family.vector))
        return
    assert message is not None
    assert consumers.well_formed(message), message
    assert consumers.files(family.vector) == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "damage", list(parameters(d for d in damages.DAMAGES if d.artefact in WHAT_IS_SERVED))
)
def test_the_doctor_says_of_it_what_the_loader_does(good, tmp_path, damage):
    """Before any weight is read: what a dry run takes, and what it refuses, with cause and cure."""
    family = copy_family(good[damage.form].family, tmp_path / "family")
    damage.apply(family)
    before = consumers.files(family.task.parent)
    model = str(family.task)
    message, _ = consumers.refusal(
        lambda: prepare_model(LoaderConfig.parse({}), model, None, None, device="cpu")
    )
    findings = dry_run(Question(model))
    if not os.path.lexists(family.plan):  # there may be one to come: asked of a model alone
        assert "neither a plan" in findings[-1].cause
        return
    failed = [finding for finding in findings if finding.status == "fail"]
    assert len(failed) == (message is not None), (message, findings)
    if message is not None:
        (finding,) = failed
        assert finding is findings[-1]
        assert finding.cause
        assert finding.cure
        assert finding.found in message
    assert consumers.files(family.task.parent) == before


@pytest.mark.refuses("an unknown or ill-typed loader key")
@pytest.mark.parametrize(("keys", "message"), damaged_configs.CONFIGS, ids=str)
def test_bad_configuration_is_refused_before_anything_is_read(keys, message):
    with pytest.raises(ConfigError, match=message) as raised:
        LoaderConfig.parse(keys)
    assert "expected an object with keys among" in str(raised.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", damaged_configs.PATHS)
@pytest.mark.parametrize("key", ["safety_vector", "merge_plan", "base_model"])
def test_a_path_that_leads_nowhere(small, tmp_path, monkeypatch, key, path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    keys = {key: damaged_configs.PATHS[path](tmp_path)}
    if key == "base_model":
        keys["safety_vector"] = str(small.family.vector)
    model = str(small.family.task)
    message, _ = consumers.refusal(
        lambda: prepare_model(LoaderConfig.parse(keys), model, None, str(tmp_path), device="cpu")
    )
    assert message is not None
    assert consumers.well_formed(message), message
