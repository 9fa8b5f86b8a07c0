"""The merged stream and the offline merge."""

import shutil

import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import shard

from enchtable_vllm.checkpoint import Checkpoint, Location, locate, tensor_digest
from enchtable_vllm.errors import (
    CheckpointError,
    ConfigError,
    IncompleteMergeError,
    MismatchError,
    NonFiniteError,
)
from enchtable_vllm.merge import Ahead, MergeStream, TensorMerge, merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.vector import SafetyVector, build_vector

Q = "model.layers.0.self_attn.q_proj.weight"


def inputs(family, **options):
    return SafetyVector.open(family.vector), resolve_plan(*read_plan(family.plan), **options)


def stored(family):
    return sorted(load_file(family.task / "model.safetensors").items())


def stream(family, source, *, ahead=None, **options):
    vector, resolved = inputs(family)
    of_one = {key: options.pop(key) for key in ("rounding", "verify_content") if key in options}
    merge_one = TensorMerge(resolved, vector, what="task model", **of_one)
    taken = {} if ahead is None else {"ahead": ahead(merge_one).take}
    pass_ = MergeStream(merge_one, **taken, **options)
    return dict(pass_.merge(source)), pass_.report


def test_merged_is_multiply_add_round_of_the_plans_coefficient(family):
    """Written again in float32 arithmetic, tensor by tensor; the rest is untouched."""
    vector, resolved = inputs(family)
    before = dict(stored(family))
    merged, report = stream(family, before.items())
    changed = 0
    for name, tensor in before.items():
        if name in resolved.coefficients:
            c = torch.tensor(resolved.coefficients[name][0], dtype=torch.float32)
            expected = (tensor.float() + vector.read(name).float() * c).bfloat16()
            assert torch.equal(merged[name], expected)
            changed += not torch.equal(expected, tensor)
        else:
            assert merged[name] is tensor
    assert changed == len(report.effects) == 8
    assert report.kept == len(before) - 8


def test_line_says_everything_a_person_needs(family):
    vector, resolved = inputs(family)
    _, report = stream(family, stored(family))
    line = report.line()
    assert line.startswith("safety vector merged: 8 merged, 13 kept, 0 filtered; retained share ")
    for part in (
        "vector 'safety-vector'", vector.fingerprint[7:19], resolved.digest[7:19],
        "beta 0.5", "scope attention", " s",
    ):  # fmt: skip
        assert part in line
    assert report.to_json()["merged"] == 8


def test_offline_merge_is_the_stream_in_the_same_files(family, tmp_path):
    vector, resolved = inputs(family)
    report = merge_checkpoint(Location(family.task), vector, resolved, tmp_path / "out")
    merged, streamed = stream(family, stored(family), digest_merged=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == merged.keys()
    assert all(torch.equal(written[name], merged[name]) for name in merged)
    assert report.merged_digest == streamed.merged_digest
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json"}
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_offline_merge_keeps_sharding_and_every_other_file(family, tmp_path):
    folder = shard(family.task, tmp_path / "task")
    for name, text in (("chat_template.jinja", "{{x}}"), ("tokenizer.json", "{}")):
        (folder / name).write_text(text)
    vector, resolved = inputs(family)
    merge_checkpoint(Location(folder), vector, resolved, tmp_path / "out")
    before = {p.name for p in folder.iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == before
    for name in ("chat_template.jinja", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    expected, _ = stream(family, stored(family))
    opened = Checkpoint(tmp_path / "out")
    assert all(torch.equal(opened.read(name), expected[name]) for name in expected)


def test_merging_twice_gives_the_same_bytes(family, tmp_path):
    vector, resolved = inputs(family)
    for name in ("a", "b"):
        merge_checkpoint(Location(family.task), vector, resolved, tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_what_is_planned_must_come(family):
    missing = [(n, t) for n, t in stored(family) if n != Q]
    with pytest.raises(IncompleteMergeError, match="q_proj"):
        stream(family, missing)
    merged, report = stream(family, missing, may_filter=lambda name: name == Q)
    assert Q not in merged
    assert report.filtered == 1
    with pytest.raises(IncompleteMergeError):
        stream(family, [], may_filter=lambda _: True)


def test_a_stream_that_is_not_finished_has_no_report(family):
    vector, resolved = inputs(family)
    pass_ = MergeStream(TensorMerge(resolved, vector, what="task model"))
    for _ in pass_.merge(iter(stored(family)[:3])):
        break
    assert pass_.report is None


def test_unknown_and_repeated_and_reshaped_tensors_are_refused(family):
    with pytest.raises(MismatchError, match="one it does not know"):
        stream(family, [("surprise", torch.ones(1)), *stored(family)])
    merged, _ = stream(family, [("surprise", torch.ones(1)), *stored(family)], foreign=True)
    assert "surprise" in merged
    with pytest.raises(MismatchError, match="a second time"):
        stream(family, [*stored(family), *stored(family)])
    reshaped = [(n, t[:4] if n == Q else t) for n, t in stored(family)]
    with pytest.raises(MismatchError, match=r"\[4, 256\]"):
        stream(family, reshaped)
    packed = [(n, t.to(torch.int8) if n == Q else t) for n, t in stored(family)]
    with pytest.raises(MismatchError, match="int8"):
        stream(family, packed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(family, bad):
    tensors = dict(stored(family))
    tensors[Q] = tensors[Q].clone()
    tensors[Q][3, 3] = bad
    with pytest.raises(NonFiniteError, match=r"self_attn\.q_proj\.weight' has 1"):
        stream(family, tensors.items())


def test_a_vector_that_is_not_finite_is_blamed_by_name(damaged, edit_json):
    """Though its own manifest vouches for the bytes."""
    path = damaged.vector / "safety_vector.safetensors"
    tensors = load_file(path)
    tensors[Q][3, 3] = float("nan")
    save_file(tensors, path)
    edit_json(
        damaged.vector / "safety_vector.json", "tensors", Q, "digest",
        value=tensor_digest(tensors[Q]),
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"safety vector .*q_proj\.weight': .*diverged"):
        stream(damaged, stored(damaged))


def test_an_int8_vector_is_merged_as_it_is_stored(family, tmp_path):
    """The same bits as the dense vector that it stands for; nothing is unpacked on the way."""
    locations = locate(family.aligned), locate(family.surrogate)
    build_vector(*locations, tmp_path / "v", dtype="int8")
    vector = SafetyVector.open(tmp_path / "v")
    (tmp_path / "plan.json").write_text(
        models.plan_for(family.task, family.base, tmp_path / "v", beta=0.5).to_json()
    )
    resolved = resolve_plan(*read_plan(tmp_path / "plan.json"))
    before = dict(stored(family))
    pass_ = MergeStream(TensorMerge(resolved, vector, what="task model"))
    merged = dict(pass_.merge(before.items()))
    for name, row in resolved.coefficients.items():
        c = torch.tensor(row[0], dtype=torch.float32)
        expected = (before[name].float() + vector.read(name).float() * c).bfloat16()
        assert torch.equal(merged[name], expected)
    exact = load_file(family.aligned / "model.safetensors")[Q]
    exact = exact - load_file(family.surrogate / "model.safetensors")[Q]
    assert 1e-3 < float((vector.read(Q).float() - exact).norm() / exact.norm()) < 1e-2
    assert pass_.report.total.retained_share > 0.9


def test_stochastic_rounding_is_the_same_in_every_run_and_order(family, tmp_path):
    """It depends on name and index alone; and it is another rounding than to nearest."""
    vector, resolved = inputs(family)
    nearest, before = stream(family, stored(family), digest_merged=True)
    forwards, report = stream(family, stored(family), rounding="stochastic", digest_merged=True)
    _, again = stream(family, reversed(stored(family)), rounding="stochastic", digest_merged=True)
    assert report.merged_digest == again.merged_digest != before.merged_digest
    offline = merge_checkpoint(
        Location(family.task), vector, resolved, tmp_path / "out", rounding="stochastic"
    )
    assert offline.merged_digest == report.merged_digest
    assert "scope attention, rounding stochastic; " in report.line()
    assert "rounding" not in before.line()
    for name in resolved.coefficients:
        steps = (forwards[name].float() - nearest[name].float()).abs()
        exact = nearest[name].float().abs() * 2**-7  # one step of bf16, at the least
        assert bool((steps <= exact + 1e-9).all())
        assert 0.05 < float((steps > 0).float().mean()) < 0.5


def test_stochastic_rounding_of_fp16_is_refused_before_anything_is_written(family, tmp_path):
    task = models.perturbed(family.base, tmp_path / "task", scale=2e-3, seed=2, dtype=torch.float16)
    vector = SafetyVector.open(family.vector)
    plan = models.plan_for(task, family.base, family.vector, beta=0.5)
    (tmp_path / "plan.json").write_text(plan.to_json())
    resolved = resolve_plan(*read_plan(tmp_path / "plan.json"))
    with pytest.raises(ConfigError, match=r"bf16 or fp32 where the plan merges, got fp16"):
        merge_checkpoint(Location(task), vector, resolved, tmp_path / "out", rounding="stochastic")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def merging_ahead(family):
    """Merges in a thread, from the file itself, within a budget."""
    begun = []
    task = Checkpoint(family.task)

    def begin(budget_bytes, order=lambda names: names, *, beside=False):
        def of(merge_one):
            names = order([n for n in task.tensors if n in merge_one.resolved.coefficients])
            sizes = {name: task.nbytes(name) for name in names}

            def make(name):
                return merge_one.from_file(name, task)

            begun.append(Ahead(make, sizes, budget_bytes, threads=2, beside=beside))
            return begun[-1]

        return of

    yield begin
    for each in begun:
        each.close()


@pytest.mark.parametrize("budget", [0, 300_000, 10**9])
@pytest.mark.parametrize("order", [list, reversed])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic", "verify_content": True}])
def test_merging_ahead_changes_nothing_but_the_time(
    family, merging_ahead, budget, order, beside, options
):
    expected, alone = stream(family, stored(family), digest_merged=True, **options)
    ahead = merging_ahead(budget, order, beside=beside)
    got, report = stream(family, stored(family), ahead=ahead, digest_merged=True, **options)
    assert list(got) == [name for name, _ in stored(family)]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
    assert (report.kept, report.merged_digest) == (13, alone.merged_digest)
    assert report.effects == alone.effects


def test_what_was_merged_ahead_must_be_of_the_kind_that_comes(family, merging_ahead):
    bad = [(n, t.float() if n == Q else t) for n, t in stored(family)]
    ahead = merging_ahead(10**9)

    def patiently(merge_one):
        begun = ahead(merge_one)
        begun.fill()
        return begun

    with pytest.raises(MismatchError, match=r"bfloat16, as its file says, got \[256, 256\]"):
        stream(family, bad, ahead=patiently)


def test_content_verification_finds_one_changed_byte_anywhere(family):
    """Sampling cannot see it: it lies between the samples."""
    tensors = dict(stored(family))
    stream(family, tensors.items(), verify_content=True)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[10_000] += 1
    with pytest.raises(MismatchError, match=r"up_proj.*content"):
        stream(family, tensors.items(), verify_content=True)
    stream(family, tensors.items())


def test_offline_merge_refuses_the_wrong_task_model_and_vector(family, damaged, tmp_path):
    vector, resolved = inputs(family)
    with pytest.raises(MismatchError, match="the task model that the plan was made for"):
        merge_checkpoint(Location(family.base), vector, resolved, tmp_path / "out")
    shutil.rmtree(damaged.vector)
    build_vector(locate(damaged.aligned), locate(damaged.surrogate), damaged.vector, dtype="fp32")
    with pytest.raises(MismatchError, match="the vector that the plan was made for"):
        merge_checkpoint(
            Location(family.task), SafetyVector.open(damaged.vector), resolved, tmp_path / "out"
        )


def at_beta(family, beta):
    vector, resolved = inputs(family, beta=beta)
    pass_ = MergeStream(TensorMerge(resolved, vector, what="task model"))
    list(pass_.merge(stored(family)))
    return pass_.report


def test_low_retained_share_warns(family):
    """At a small beta bf16 rounds most of the vector away, and the report says so."""
    report = at_beta(family, 2e-3)
    assert report.total.retained_share < 0.5
    assert "larger beta" in report.warnings()[0]
    assert stream(family, stored(family))[1].warnings() == []


def test_too_large_a_beta_warns_before_it_undoes_itself(family):
    """Interference grows with beta and takes the vector away exponentially."""
    assert "smaller beta" in at_beta(family, 20.0).warnings()[0]


@pytest.mark.parametrize("beta", [1e-9, 1e5])
def test_a_merge_that_changes_nothing_is_refused(family, beta):
    """Too small to survive rounding, or attenuated to nothing: unmerged weights in effect."""
    with pytest.raises(IncompleteMergeError, match="differ from the task model's"):
        at_beta(family, beta)


@pytest.mark.parametrize("beta", [0.5, 2e-3])
def test_what_is_served_in_16_bits_is_measured_in_them(family, beta):
    """Stored in fp32, of values that bf16 has: what is served is what bf16 stores."""
    vector, resolved = inputs(family, beta=beta)
    rounded = at_beta(family, beta).total
    wider = [(name, tensor.float()) for name, tensor in stored(family)]
    kept = MergeStream(TensorMerge(resolved, vector, what="task model"))
    served = MergeStream(TensorMerge(resolved, vector, what="task model"), served=torch.bfloat16)
    assert dict(kept.merge(wider)).keys() == dict(served.merge(wider)).keys()
    assert kept.report.total.retained_share == pytest.approx(1.0, abs=1e-3)
    assert served.report.total.added_sq == pytest.approx(rounded.added_sq, rel=1e-5)
    assert served.report.total.overlap == pytest.approx(rounded.overlap, rel=1e-3)
    assert served.report.total.intended_sq == kept.report.total.intended_sq
    assert bool(served.report.warnings()) == (beta < 0.1)


def test_a_merge_that_changes_nothing_of_what_is_served_is_refused(family):
    vector, resolved = inputs(family, beta=1e-8)
    wider = [(name, tensor.float()) for name, tensor in stored(family)]
    for served in (torch.float32, None):
        pass_ = MergeStream(TensorMerge(resolved, vector, what="task model"), served=served)
        list(pass_.merge(wider))
        assert pass_.report.total.added_sq > 0
    pass_ = MergeStream(TensorMerge(resolved, vector, what="task model"), served=torch.bfloat16)
    with pytest.raises(IncompleteMergeError, match=r"none that does.*served in torch\.bfloat16"):
        list(pass_.merge(wider))


def test_a_beta_beyond_measure_is_refused(family, tmp_path):
    """Of a matrix that the fine-tune left alone nothing is attenuated."""
    family = models.copy_family(family, tmp_path / "family")
    path = family.task / "model.safetensors"
    tensors = load_file(path) | {Q: load_file(family.base / "model.safetensors")[Q]}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="far too large"):
        models.plan_for(family.task, family.base, family.vector, beta=1e30)
    family.plan.write_text(models.plan_for(family.task, family.base, family.vector).to_json())
    with pytest.raises(ConfigError, match="far too large"):  # asked for when it is merged
        at_beta(family, 1e30)


def test_outputs_never_replace_inputs(damaged):
    vector, resolved = inputs(damaged)
    for out in (damaged.task, damaged.task.parent, damaged.vector):
        with pytest.raises(ConfigError, match="none of the inputs"):
            merge_checkpoint(Location(damaged.task), vector, resolved, out, overwrite=True)
    assert (damaged.task / "model.safetensors").is_file()


def test_subfolders_come_along_but_not_the_vector(damaged, tmp_path):
    (damaged.task / "assets").mkdir()
    (damaged.task / "assets" / "logo.txt").write_text("x")
    for name in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot"):
        (damaged.task / name).write_text("the same model, unmerged")
    vector, resolved = inputs(damaged)
    merge_checkpoint(Location(damaged.task), vector, resolved, tmp_path / "out")
    assert (tmp_path / "out" / "assets" / "logo.txt").read_text() == "x"
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"assets", "config.json", "generation_config.json", "model.safetensors"}


def test_files_that_are_written_to_meanwhile_are_refused(damaged, tmp_path, monkeypatch):
    """Also of the formats whose bytes are mapped, not read."""
    vector, resolved = inputs(damaged)
    read = Checkpoint.read

    def then_written_to(self, name):
        tensor = read(self, name)
        if self.what.startswith("task model") and name == last:
            (self.folder / "model.safetensors").touch()
        return tensor

    last = list(Checkpoint(damaged.task).tensors)[-1]
    monkeypatch.setattr(Checkpoint, "read", then_written_to)
    with pytest.raises(CheckpointError, match=r"another 'model\.safetensors'"):
        merge_checkpoint(Location(damaged.task), vector, resolved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        models.plan_for(damaged.task, damaged.base, damaged.vector)


def test_fp32_and_fp16_task_models(family):
    for dtype in (torch.float32, torch.float16):
        tensors = {n: t.to(dtype) for n, t in stored(family)}
        merged, _ = stream(family, tensors.items())
        assert merged[Q].dtype == dtype
