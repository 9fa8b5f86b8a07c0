"""What a signature's digests reach: masks through the plan, and hashes of other tools' choice."""

import math

import live
import model_signing
import pytest
import signers
from signers import SIGNATURE, flip, prepared, refused
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.errors import MergePlanError


def read_masks(found):
    """Every mask that a merge reads."""
    for name in found.resolved.coefficients:
        found.masks.read(name, math.prod(found.vector.tensors[name].shape))


@pytest.fixture
def masked(root, keys):
    """A plan with masks, signed."""
    family, plan = root.family, root.plan("sv")
    planned = CliRunner().invoke(
        cli.app,
        ["plan", "--task-model", str(family.task), "--base-model", str(family.base),
         "--safety-vector", str(root.path / "sv"), "-o", str(plan), "--density", "0.5"],
    )  # fmt: skip
    assert planned.exit_code == 0, planned.output
    keys["ours"].sign(root.path / "sv")
    (file,) = plan.with_suffix(".masks").iterdir()
    return file


def test_masks_are_covered_and_checked_by_the_signed_plan(root, keys, masked):
    assert signers.checked(root, keys["ours"].required) == 7
    read_masks(prepared(root, keys["ours"].required))
    flip(masked, -1)
    refused(lambda: signers.checked(root, keys["ours"].required), "keep_bits.safetensors")
    with pytest.raises(MergePlanError, match="of content"):
        read_masks(prepared(root, keys["ours"].required))


def test_masks_of_another_plan(root, keys, masked, tmp_path):
    """Whole, of the same shapes, and with a plan that fits them: the plan was not signed."""
    family, vector = root.family, root.path / "sv"
    other = tmp_path / "other.json"
    planned = CliRunner().invoke(
        cli.app,
        ["plan", "--task-model", str(family.task), "--base-model", str(family.base),
         "--safety-vector", str(vector), "-o", str(other), "--density", "0.1"],
    )  # fmt: skip
    assert planned.exit_code == 0, planned.output
    (file,) = other.with_suffix(".masks").iterdir()
    masked.write_bytes(file.read_bytes())
    with pytest.raises(MergePlanError, match="of content"):
        read_masks(prepared(root, keys["ours"].required))
    refused(lambda: prepared(root, keys["ours"].required, merge_plan=str(other)), "other.json")


def signed_by_the_library(root, keys, hashing):
    vector = root.path / "sv"
    (vector / SIGNATURE).unlink()
    config = model_signing.signing.Config().set_hashing_config(hashing)
    config.use_elliptic_key_signer(private_key=keys["ours"].private)
    config.sign(vector, vector / SIGNATURE)


def test_blake3_counts_too(root, keys):
    hashing = model_signing.hashing.Config()
    signed_by_the_library(root, keys, hashing.use_file_serialization(hashing_algorithm="blake3"))
    assert prepared(root, keys["ours"].required).signed_by
    assert signers.checked(root, keys["ours"].required) == 6
    live.add_plan(root, "sv", beta=0.25)
    refused(lambda: prepared(root, keys["ours"].required), "a plan that was signed")


def test_a_hash_that_is_not_known_is_refused(root, keys):
    """Not taken for one that matches nothing, nor for none."""
    hashing = model_signing.hashing.Config()
    signed_by_the_library(root, keys, hashing.use_file_serialization(hashing_algorithm="blake2"))
    refused(lambda: prepared(root, keys["ours"].required), "one of digests by ['blake2b']")
