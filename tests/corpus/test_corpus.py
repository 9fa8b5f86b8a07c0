"""Every damage through every consumer: a clear refusal, and nothing left behind."""

import pytest
from corpus import consumers, damages
from models import copy_family


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
