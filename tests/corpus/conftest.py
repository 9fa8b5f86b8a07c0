"""The good family that the corpus damages."""

import pytest
import torch
from corpus import consumers, seeds


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices of 32 × 32: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A good family, and what every consumer makes of it."""
    folder = tmp_path_factory.mktemp("small")
    return consumers.reference(seeds.small_family(folder / "family"), folder / "out")
