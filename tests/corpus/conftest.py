"""The good family that the corpus damages."""

import pytest
from corpus import consumers, seeds


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A good family, and what every consumer makes of it."""
    folder = tmp_path_factory.mktemp("small")
    return consumers.reference(seeds.small_family(folder / "family"), folder / "out")
