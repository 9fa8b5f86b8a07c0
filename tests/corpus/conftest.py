"""The good family that the corpus damages."""

import models
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
def good(tmp_path_factory):
    """A good family of each form, and what every consumer makes of it."""
    references = {}
    plain = seeds.small_family(tmp_path_factory.mktemp("plain") / "family")
    for form, make in seeds.FORMS.items():
        folder = tmp_path_factory.mktemp(form)
        family = models.copy_family(plain, folder / "family")
        make(family)
        references[form] = consumers.reference(family, folder / "out")
    return references


@pytest.fixture(scope="session")
def small(good):
    """The plain one."""
    return good["plain"]
