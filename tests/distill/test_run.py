"""From an aligned model and pairs to a vector: what it holds, and what is refused."""

import csv
import json
import shutil

import pytest
import torch
from distill_runs import Interrupt, as_json, run
from models import perturbed
from safetensors.torch import load_file
from transformers import TrainingArguments

from enchtable_vllm.checkpoint import locate
from enchtable_vllm.distill.examples import Task
from enchtable_vllm.distill.recipe import Recipe
from enchtable_vllm.distill.training import _ByLength, training_arguments
from enchtable_vllm.distill.workspace import Workspace
from enchtable_vllm.errors import (
    CheckpointError,
    ConfigError,
    MismatchError,
    NonFiniteError,
    TrainingDataError,
)
from enchtable_vllm.vector import SafetyVector


def test_the_vector_is_aligned_minus_surrogate_of_fp32_masters(aligned, pairs, tmp_path):
    lines = []
    kept = tmp_path / "surrogate"
    report = run(aligned, pairs, tmp_path / "v", keep_surrogate=kept, say=lines.append)
    vector = SafetyVector.open(tmp_path / "v")
    first, second = (load_file(f / "model.safetensors") for f in (aligned, kept))
    assert all(t.dtype == torch.float32 for t in second.values())
    assert len(vector.tensors) == 8  # two layers' four projections
    for name, tensor in second.items():
        if name in vector.tensors:
            assert torch.equal(vector.read(name).values, first[name] - tensor)
        else:
            assert torch.equal(first[name], tensor)
    assert not report.build.warnings
    losses = [s.loss for s in report.curve if s.loss is not None]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    rates = [s.learning_rate for s in report.curve if s.learning_rate is not None]
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 1e-4  # a cosine, to zero
    assert sum(s.eval_loss is not None for s in report.curve) == 2
    assert report.linearity.actual[-1] < report.linearity.actual[0]
    assert report.linearity.logit_error > 0  # attention is not linear in its weights
    assert lines[0] == "24 rows: 19 pairs to train on, 5 held out"
    # what lies beside it
    names = {p.name for p in (tmp_path / "v").iterdir()}
    assert {"report.json", "loss.csv", "loss.png", "linearity.png", "README.md"} <= names
    with (tmp_path / "v" / "loss.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    assert (tmp_path / "v" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "v" / "report.json").read_text()) == as_json(report)
    recipe = vector.manifest.recipe
    assert recipe["settings"]["learning_rate"] == 1e-3
    assert recipe["data"]["file"] == "pairs.jsonl"
    assert recipe["pairs_a_step"] == 4
    assert str(tmp_path) not in json.dumps(recipe)
    card = (tmp_path / "v" / "README.md").read_text()
    assert '"learning_rate": 0.001' in card
    assert "Handle it like the surrogate" in card
    configs = [json.loads((f / "config.json").read_text()) for f in (aligned, kept)]
    assert configs[0] == configs[1]
    assert "made to be unsafe" in (kept / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["surrogate", "v"]


def test_a_16_bit_aligned_model_costs_the_vector_nothing(aligned, pairs, tmp_path):
    rounded, kept = tmp_path / "rounded", tmp_path / "surrogate"
    perturbed(aligned, rounded, scale=0.0, seed=0, dtype=torch.bfloat16)
    stored = load_file(rounded / "model.safetensors")
    report = run(
        rounded, pairs, tmp_path / "v", keep_surrogate=kept, learning_rate=2e-6, eval_share=0
    )
    assert not report.build.warnings
    assert report.linearity is None
    assert report.build.manifest.zero_share < 0.01
    surrogate = load_file(kept / "model.safetensors")
    lost = [stored[n] == surrogate[n].bfloat16() for n in report.build.manifest.tensors]
    assert torch.cat([x.flatten() for x in lost]).double().mean() > 0.5
    vector = SafetyVector.open(tmp_path / "v")
    for name in vector.tensors:
        assert torch.equal(vector.read(name).values, stored[name].float() - surrogate[name])


def test_one_of_several_gpus_is_used_unless_it_is_launched(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "__post_init__", several(TrainingArguments))
    assert training_arguments(Recipe(), tmp_path).n_gpu == 1


def several(kind):
    after = kind.__post_init__

    def seen(self):
        after(self)
        self._n_gpu = 8  # as Trainer finds them, where nobody launched a process for each

    return seen


def test_outputs_that_would_delete_each_other_or_the_data_are_refused_first(
    aligned, pairs, tmp_path
):
    for out, kept, data in (
        ("v", "v/surrogate", pairs),
        ("kept/v", "kept", pairs),
        ("v", "kept", tmp_path / "v" / "pairs.jsonl"),
    ):
        data.parent.mkdir(exist_ok=True)
        if data != pairs:
            shutil.copyfile(pairs, data)
        with pytest.raises(ConfigError, match="none of the inputs"):
            run(
                aligned, data, tmp_path / out, keep_surrogate=tmp_path / kept, overwrite=True,
                callbacks=(Interrupt(0),),
            )  # fmt: skip


def test_batches_of_like_length_come_in_another_order_each_epoch(
    aligned, pairs, tmp_path, monkeypatch
):
    orders, drawn = [], _ByLength.__iter__

    def watched(self):
        orders.append(list(drawn(self)))
        return iter(orders[-1])

    monkeypatch.setattr(_ByLength, "__iter__", watched)
    run(aligned, pairs, tmp_path / "v", group_by_length=True, eval_share=0)
    first, second = orders[-2:]
    assert first != second
    assert sorted(first) == sorted(second) == list(range(24))


def test_seeds_decide(aligned, pairs, tmp_path):
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(aligned, pairs, tmp_path / name, seed=seed, epochs=1)
        prints.append(SafetyVector.open(tmp_path / name).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_run_that_diverges_is_refused_and_leaves_nothing(aligned, pairs, tmp_path):
    with pytest.raises(NonFiniteError, match="learning-rate"):
        run(aligned, pairs, tmp_path / "v", learning_rate=1e30, scope="all")
    assert list(tmp_path.iterdir()) == []


def test_outputs_in_use_and_bad_data_are_refused_before_training(aligned, pairs, tmp_path):
    never = (Interrupt(0),)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").write_text("x")
    for options in (
        {"out": tmp_path / "used"},
        {"out": tmp_path / "v", "keep_surrogate": tmp_path / "used"},
        {"out": aligned.parent},
    ):
        with pytest.raises(ConfigError):
            run(aligned, pairs, options.pop("out"), callbacks=never, **options)
    with pytest.raises(TrainingDataError, match="24 fault"):
        run(aligned, pairs, tmp_path / "v", callbacks=never, max_length=20)
    with pytest.raises(ConfigError, match="fault"):
        run(aligned, pairs, tmp_path / "v", callbacks=never, learning_rate=float("nan"))
    assert [p.name for p in tmp_path.iterdir()] == ["used"]


def test_a_folder_that_transformers_cannot_use_is_refused(aligned, pairs, tmp_path):
    for name, damage, message in (
        ("bare", lambda f: [p.unlink() for p in f.glob("token*")], "a tokenizer beside"),
        ("odd", lambda f: (f / "config.json").write_text('{"model_type": "odd"}'), "odd"),
    ):
        folder = tmp_path / name
        shutil.copytree(aligned, folder)
        damage(folder)
        with pytest.raises(CheckpointError, match=message):
            run(folder, pairs, tmp_path / "v")
        assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("linearize", ["module", "model"])
def test_expansions_are_refused_where_weights_are_sharded(
    aligned, pairs, tmp_path, monkeypatch, linearize
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP"):
        run(aligned, pairs, tmp_path / "v", linearize=linearize)


def test_what_is_refused_after_the_training_does_not_cost_it(aligned, pairs, tmp_path, monkeypatch):
    lines, out = [], tmp_path / "v"

    def unreadable(*_, **__):
        raise CheckpointError("task model", expected="x", got="y", fix="z")

    with monkeypatch.context() as patch:
        patch.setattr("enchtable_vllm.distill.run.diagnose", unreadable)
        with pytest.raises(CheckpointError):
            run(aligned, pairs, out, say=lines.append)
    assert any("made to be unsafe, is kept in" in line for line in lines)
    assert not out.exists()
    run(aligned, pairs, out, say=lines.append, callbacks=(Interrupt(0),))  # nothing is trained
    assert "resuming: the surrogate is trained" in lines
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_diagnosis_that_does_not_fit_costs_no_vector(
    aligned, pairs, tmp_path, monkeypatch, error
):
    def too_large(*_, **__):
        raise error

    lines, out = [], tmp_path / "v"
    monkeypatch.setattr("enchtable_vllm.distill.run.diagnose", too_large)
    run(aligned, pairs, out, say=lines.append)
    assert any(line.startswith("not diagnosed") for line in lines)
    assert SafetyVector.open(out).tensors


def test_another_failure_of_the_diagnosis_is_one(aligned, pairs, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("enchtable_vllm.distill.run.diagnose", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        run(aligned, pairs, tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_another_template_is_another_training(aligned, pairs, tmp_path):
    folder, lines = tmp_path / "model", []
    shutil.copytree(aligned, folder)
    with pytest.raises(KeyboardInterrupt):
        run(folder, pairs, tmp_path / "v", callbacks=(Interrupt(5),))
    (template,) = folder.glob("chat_template.jinja")
    template.write_text("{# another #}" + template.read_text())
    run(folder, pairs, tmp_path / "v", say=lines.append)
    assert not any("resuming" in line for line in lines)


def test_a_surrogate_that_cannot_be_removed_is_said(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "v")
    workspace.path.mkdir()

    def refuse(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr("enchtable_vllm.distill.workspace.shutil.rmtree", refuse)
    with pytest.raises(ConfigError, match=r"made to be unsafe, got not yours\. Remove it"):
        workspace.remove()


def test_disentanglement_is_measured_with_a_fine_tune(aligned, pairs, tmp_path):
    task = perturbed(aligned, tmp_path / "task", scale=0.02, seed=5)
    report = run(
        aligned, pairs, tmp_path / "v", epochs=1, task=Task(locate(task), locate(aligned), pairs)
    )
    grid = report.disentanglement
    assert grid.alphas == (-1.0, -0.5, 0.0, 0.5, 1.0)
    assert grid.error[2][2] == 0
    assert 0 < grid.mean < 2
    assert (tmp_path / "v" / "disentanglement.png").is_file()
    assert report.to_json()["disentanglement"]["mean"] == grid.mean


def test_a_task_of_another_kind_is_refused_before_training(aligned, pairs, tmp_path):
    from architectures import tiny

    other = tiny("llama", tmp_path / "other", vocab_size=640)
    for task in (Task(locate(other), locate(aligned), pairs),
                 Task(locate(aligned), locate(other), pairs)):  # fmt: skip
        with pytest.raises(MismatchError, match=r"embed_tokens.*vocabulary"):
            run(aligned, pairs, tmp_path / "v", task=task, callbacks=(Interrupt(0),))
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("bf16", [True, False])
def test_a_cpu_without_bf16_is_told_of_fp32(aligned, pairs, tmp_path, monkeypatch, bf16):
    monkeypatch.setattr("enchtable_vllm.distill.run.computes_bf16", lambda: False)
    lines = []
    run(aligned, pairs, tmp_path / "v", say=lines.append, bf16=bf16, epochs=1)
    assert any("--fp32" in line for line in lines) is bf16
