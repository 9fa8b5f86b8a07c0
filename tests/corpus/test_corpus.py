"""Every damage through every consumer: a clear refusal, and nothing left behind."""

import pytest
from corpus import consumers, damaged_configs, damages
from models import copy_family

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import prepare_model


def parameters():
    for damage in damages.DAMAGES:
        marks = [pytest.mark.refuses(damage.proves)] if damage.proves else []
        yield pytest.param(damage, id=f"{damage.artefact}: {damage.name}", marks=marks)


@pytest.mark.timeout(60)  # a FIFO that is opened waits for ever
@pytest.mark.parametrize("damage", list(parameters()))
def test_refused_by_every_consumer(small, tmp_path, damage):
    family = copy_family(small.family, tmp_path / "family")
    damage.apply(family)
    consumers.check_refused(small, family, damage, tmp_path / "out")


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
