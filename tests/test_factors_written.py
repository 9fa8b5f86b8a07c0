"""Factors come to lie beside a vector whole, or not at all, one writer at a time."""

import os
import subprocess
import sys

import models
import pytest
from corpus import consumers
from corpus.test_around_files import no_room, open_folder
from test_factors import FILE, add, plan
from users import nobody

from enchtable_vllm.checkpoint import AdditionTransaction
from enchtable_vllm.vector import SafetyVector
from enchtable_vllm.vector.format import VECTOR_MANIFEST

__all__ = ["open_folder"]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def factored(damaged):
    """A family whose vector has factors of another γ than those that are to replace them."""
    add(damaged.vector, gamma=0.25)
    return damaged


def refused(folder):
    message, _ = consumers.refusal(lambda: consumers.command("vector", "factor", folder))
    assert message is not None
    assert consumers.well_formed(message), message
    return message


@pytest.mark.parametrize("size", [0, 2048])
def test_no_room(factored, size):
    before = content(factored.vector)
    with no_room(size):
        assert "File too large" in refused(factored.vector)
    assert content(factored.vector) == before


def test_no_permission(factored, open_folder):
    family = models.copy_family(factored, open_folder / "family")
    family.vector.chmod(0o555)
    before = content(family.vector)
    with nobody():
        assert "Permission denied" in refused(family.vector)
    assert content(family.vector) == before


def test_another_process_that_is_at_it(factored):
    before = content(factored.vector)
    stem = FILE.removesuffix(".safetensors")
    with AdditionTransaction(factored.vector, stem, index=VECTOR_MANIFEST, without="") as partial:
        assert "another one that is at it" in refused(factored.vector)
        partial.joinpath(VECTOR_MANIFEST).write_bytes(before[VECTOR_MANIFEST])
        partial.joinpath(FILE).write_bytes(before[FILE])
    assert content(factored.vector) == before


#: Factors a vector, and ends as if killed before one of the renames.
KILLED = """
import os, sys
from pathlib import Path
from test_factors import add
rename, left = Path.rename, [int(sys.argv[2])]
def counted(*arguments):
    if not left[0]:
        os._exit(9)
    left[0] -= 1
    return rename(*arguments)
Path.rename = counted
add(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("renames", range(3))
def test_killed_while_files_are_exchanged(family, factored, renames):
    """The vector can be planned with all the same; the next run finishes what was begun."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(factored.vector), str(renames)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False, cwd="tests",
    )  # fmt: skip
    assert done.returncode == 9
    entry = SafetyVector.open(factored.vector).manifest.factors
    assert (entry is None) == (renames > 0)
    assert plan(factored) == plan(family)
    add(factored.vector)
    expected = {*content(family.vector), FILE}
    assert set(content(factored.vector)) == expected
    assert SafetyVector.open(factored.vector).manifest.factors.rank_fraction == 0.5
    consumers.command("vector", "verify", factored.vector)
