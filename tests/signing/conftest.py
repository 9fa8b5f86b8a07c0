"""A signed vector, and the keys around it."""

import shutil

import live
import pytest
import signers

from enchtable_vllm.vector import SafetyVector, add_factors


@pytest.fixture(scope="module")
def signed_root(family, keys, tmp_path_factory):
    """Read-only; its vector has everything that a folder may hold."""
    root = signers.planned_vector(family, tmp_path_factory.mktemp("signed"))
    vector = root.path / "sv"
    add_factors(SafetyVector.open(vector), max_shard_bytes=10**9)
    shutil.copyfile(root.plan("sv"), vector / "plans" / "another-task.json")
    keys["ours"].sign(vector)
    return root


@pytest.fixture
def root(signed_root, tmp_path):
    """A copy to damage."""
    shutil.copytree(signed_root.path, tmp_path / "root")
    return live.Root(tmp_path / "root", signed_root.family, signed_root.fingerprint)
