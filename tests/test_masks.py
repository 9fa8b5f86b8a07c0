"""Masks: which elements are kept, how they are stored, and that they are what is merged."""

import math
import shutil

import models
import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file

from enchtable_kernels import pack_keep
from enchtable_vllm.checkpoint import Location, tensor_digest
from enchtable_vllm.errors import ConfigError, EnchTableError, MergePlanError
from enchtable_vllm.merge import MergeStream, TensorMerge, merge_checkpoint
from enchtable_vllm.plan import MaskOptions, open_masks, read_plan, resolve_plan
from enchtable_vllm.plan.masks import keep_mask
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import prepare_model
from enchtable_vllm.vector import SafetyVector

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 0.999, 1.0])
def test_density_keeps_exactly_the_largest(density):
    generator = torch.Generator().manual_seed(0)
    safety = torch.randn(37, 11, generator=generator)
    keep = keep_mask(safety, torch.zeros_like(safety), MaskOptions(density=density))
    assert int(keep.sum()) == math.ceil(density * safety.numel())
    if not keep.all():
        assert safety[keep].abs().min() >= safety[~keep].abs().max()


def test_of_equal_magnitudes_the_first_are_kept():
    """An int8 delta has many: how many are kept must not depend on them, nor on a sort."""
    safety = torch.tensor([[1.0, -1.0, 2.0], [1.0, 0.5, -1.0]])
    keep = keep_mask(safety, safety, MaskOptions(density=0.5))
    assert keep.tolist() == [[True, True, True], [False, False, False]]


def test_sign_conflicts_are_dropped_and_zeros_conflict_with_nothing():
    safety = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0, -1.0])
    task = torch.tensor([2.0, -2.0, 2.0, -2.0, -1.0, 0.0, -0.0])
    keep = keep_mask(safety, task, MaskOptions(drop_sign_conflicts=True))
    assert keep.tolist() == [True, False, False, True, True, True, True]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_a_density_that_is_none_is_refused(density):
    with pytest.raises(ConfigError, match="density"):
        MaskOptions(density=density)


def plan_again(family, *more):
    run(
        "plan", "--task-model", family.task, "--base-model", family.base, "--safety-vector",
        family.vector, "--beta", "0.5", "--density", "0.3", "--mask", "drop-sign-conflicts", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned(family, tmp_path_factory):
    """A family whose plan, made by the command, keeps 30% and drops sign conflicts."""
    copy = models.copy_family(family, tmp_path_factory.mktemp("masked") / "family")
    copy.plan.unlink()
    plan_again(copy)
    return copy


@pytest.fixture
def masked(planned, tmp_path):
    """A copy of it to damage."""
    return models.copy_family(planned, tmp_path / "family")


def merged_by_hand(family, resolved):
    """From the definition, without packed bits or kernels."""
    task, base = (load_file(f / "model.safetensors") for f in (family.task, family.base))
    vector = SafetyVector.open(family.vector)
    expected = {}
    for name, row in resolved.coefficients.items():
        safety, moved = vector.read(name).float(), task[name].float() - base[name].float()
        keep = keep_mask(safety, moved, MaskOptions(0.3, drop_sign_conflicts=True))
        full = (task[name].float() + safety * torch.tensor(row[0])).bfloat16()
        expected[name] = torch.where(keep, full, task[name])
    return expected


def test_what_is_left_out_is_not_merged_offline_or_at_load(masked, tmp_path):
    plan, digest = read_plan(masked.plan)
    assert plan.masks.path == "merge_plan.masks"
    assert 0.1 < plan.masks.kept_share < 0.2  # 30%, half of it of the other sign
    resolved = resolve_plan(plan, digest)
    vector = SafetyVector.open(masked.vector)
    expected = merged_by_hand(masked, resolved)
    merge_checkpoint(
        Location(masked.task), vector, resolved, tmp_path / "out",
        masks=open_masks(plan, masked.plan),
    )  # fmt: skip
    written = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(masked.task / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(written[name], expected.get(name, tensor))
    assert not (tmp_path / "out" / "merge_plan.masks" / "keep_bits.safetensors").exists()
    loaded, report = load(masked)
    assert all(torch.equal(tensor, written[name]) for name, tensor in loaded.items())
    assert report.total.retained_share == pytest.approx(plan.retained_share, abs=1e-5)


def test_the_command_merges_the_same(masked, tmp_path):
    run(
        "merge", "--task-model", masked.task, "--safety-vector", masked.vector, "--plan",
        masked.plan, "-o", tmp_path / "out",
    )  # fmt: skip
    expected = merged_by_hand(masked, resolve_plan(*read_plan(masked.plan)))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_the_same_inputs_give_the_same_masks(masked):
    folder = masked.task / "merge_plan.masks"
    inode = folder.stat().st_ino
    bits, plan = (folder / "keep_bits.safetensors").read_bytes(), masked.plan.read_bytes()
    plan_again(masked, "--jobs", "1")
    assert masked.plan.read_bytes() == plan
    assert (folder / "keep_bits.safetensors").read_bytes() == bits
    assert folder.stat().st_ino != inode  # it was written anew


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def lose_one(path):
    tensors = load_file(path)
    del tensors[Q]
    save_file(tensors, path)


def shorten_one(path):
    tensors = load_file(path)
    tensors[Q] = tensors[Q][:-1].clone()
    save_file(tensors, path)


def link_out(path):
    shutil.move(path.parent, path.parent.parent.parent / "elsewhere")
    path.parent.symlink_to(path.parent.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "bytes of content blake3"),
        (lose_one, "a mask for every merged tensor and no other"),
        (shorten_one, "bytes of content blake3"),
        (link_out, "a link to"),
        (lambda path: path.unlink(), "keep_bits"),
        (lambda path: shutil.rmtree(path.parent), "merge_plan.masks"),
    ],
)
def test_damaged_masks_are_refused(masked, damage, message):
    damage(masked.task / "merge_plan.masks" / "keep_bits.safetensors")
    with pytest.raises(EnchTableError, match=message):
        load(masked)


def load(family):
    """As the loader does."""
    prepared = prepare_model(LoaderConfig(), str(family.task), None, None, device="cpu")
    masks = prepared.masks
    pass_ = MergeStream(
        TensorMerge(prepared.resolved, prepared.vector, what="task model", masks=masks)
    )
    return dict(pass_.merge(load_file(family.task / "model.safetensors").items())), pass_.report


def test_a_plan_with_masks_is_never_merged_without_them(masked):
    resolved = resolve_plan(*read_plan(masked.plan))
    with pytest.raises(MergePlanError, match="its own masks"):
        TensorMerge(resolved, SafetyVector.open(masked.vector), what="task model")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("masks",), None),
        (("masks", "path"), "../elsewhere"),
        (("masks", "path"), "/etc"),
        (("tensors", Q, "keep_digest"), None),
    ],
)
def test_a_plan_whose_masks_do_not_fit_it_is_refused(masked, edit_json, keys, value):
    edit_json(masked.plan, *keys, value=value)
    with pytest.raises(MergePlanError):
        read_plan(masked.plan)


def test_other_bits_need_another_digest(masked, edit_json):
    """Whoever changes a mask must change the plan, whose digest the log shows."""
    path = masked.task / "merge_plan.masks" / "keep_bits.safetensors"
    tensors = load_file(path)
    tensors[Q] = pack_keep(torch.ones(256 * 256, dtype=torch.bool))
    save_file(tensors, path)
    edit_json(masked.plan, "tensors", Q, "keep_digest", value=tensor_digest(tensors[Q]))
    plan, _ = read_plan(masked.plan)
    masks = open_masks(plan, masked.plan)
    assert torch.equal(masks.read(Q, 256 * 256), tensors[Q])
    assert models.plan_for(masked.task, masked.base, masked.vector, beta=0.5).masks is None
