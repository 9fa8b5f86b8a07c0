"""What an interruption of a distillation costs: nothing but its time."""

import json
import stat
from types import SimpleNamespace

import pytest
from distill_runs import Interrupt, run
from transformers import Trainer

from enchtable_vllm.distill.training import _ByLength, _Epochs
from enchtable_vllm.vector import SafetyVector


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scope": "ffn", "linearize": "module", "gradient_checkpointing": True},
        {"scope": "all", "linearize": "model", "group_by_length": True},
    ],
    ids=["attention", "module", "model"],
)
def test_resumed_is_bit_for_bit_uninterrupted(aligned, pairs, tmp_path, settings):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(aligned, pairs, whole, **settings)
    workspace = tmp_path / ".broken.training"
    for step, found in ((5, "checkpoint-4"), (9, "checkpoint-8")):
        with pytest.raises(KeyboardInterrupt):
            run(aligned, pairs, broken, callbacks=(Interrupt(step),), **settings)
        assert not broken.exists()
        assert stat.S_IMODE(workspace.stat().st_mode) == 0o700
        assert [p.name for p in workspace.glob("checkpoint-*")] == [found]
    # a checkpoint that was being written when the process was killed is not one
    (workspace / "checkpoint-9").mkdir()
    lines = []
    run(aligned, pairs, broken, say=lines.append, **settings)
    assert "resuming: training goes on from checkpoint-8" in lines
    vectors = [SafetyVector.open(folder) for folder in (whole, broken)]
    assert vectors[0].fingerprint == vectors[1].fingerprint
    for name in ("loss.csv", "safety_vector.json", "report.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert not workspace.exists()


@pytest.mark.parametrize("step", [6, None], ids=["between epochs", "while it is saved"])
def test_resumed_at_an_epochs_end_its_evaluation_is_there(
    aligned, pairs, tmp_path, monkeypatch, step
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(aligned, pairs, whole, save_steps=5)
    with monkeypatch.context() as patched:
        if step is None:
            saving = interrupt_unless_a_checkpoint(Trainer.save_model)
            patched.setattr(Trainer, "save_model", saving)
        with pytest.raises(KeyboardInterrupt):
            run(aligned, pairs, broken, save_steps=5, callbacks=(Interrupt(step),))
    run(aligned, pairs, broken, save_steps=5)
    for name in ("loss.csv", "safety_vector.json", "report.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def interrupt_unless_a_checkpoint(save):
    def saving(self, output_dir=None, _internal_call=False):
        if not _internal_call:
            raise KeyboardInterrupt
        return save(self, output_dir, _internal_call)

    return saving


def test_order_by_length_is_told_its_epoch_by_the_trainers_state():
    sampler = _ByLength(0, 2, [3, 5, 4, 9, 8, 7, 1, 2])
    orders = []
    for epoch in (None, 0.9999999, 1.4):  # as begun; as one ended; as one goes on
        _Epochs(sampler).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        orders.append(list(sampler))
    assert orders[0] != orders[1] == orders[2]


def test_other_tokens_of_the_same_files_are_other_inputs(aligned, pairs, tmp_path, monkeypatch):
    """A template may put today's date into each prompt."""
    from enchtable_vllm.distill import examples as module

    with pytest.raises(KeyboardInterrupt):
        run(aligned, pairs, tmp_path / "v", callbacks=(Interrupt(5),))
    encode = module.encode

    def tomorrow(*arguments, **options):
        found, faults = encode(*arguments, **options)
        return [{**one, "input_ids": [*one["input_ids"][:-1], 3]} for one in found], faults

    monkeypatch.setattr(module, "encode", tomorrow)
    lines = []
    run(aligned, pairs, tmp_path / "v", say=lines.append)
    assert "begun anew: an interrupted run was of other examples" in lines
    assert not [line for line in lines if "resuming" in line]


def interrupt_after_training(monkeypatch, aligned, pairs, out):
    from enchtable_vllm.distill import run as module

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_vector", stop)
        with pytest.raises(KeyboardInterrupt):
            run(aligned, pairs, out)


def test_what_was_trained_before_the_date_changed_is_trained(aligned, pairs, tmp_path, monkeypatch):
    interrupt_after_training(monkeypatch, aligned, pairs, tmp_path / "v")
    inputs = tmp_path / ".v.training" / "inputs.json"
    inputs.write_text(json.dumps(json.loads(inputs.read_text()) | {"examples": "of yesterday"}))
    lines = []
    run(aligned, pairs, tmp_path / "v", say=lines.append, callbacks=(Interrupt(0),))
    assert "resuming: the surrogate is trained" in lines


def test_interrupted_after_training_it_does_not_train_again(aligned, pairs, tmp_path, monkeypatch):
    interrupt_after_training(monkeypatch, aligned, pairs, tmp_path / "v")
    lines = []
    report = run(aligned, pairs, tmp_path / "v", say=lines.append, callbacks=(Interrupt(0),))
    assert "resuming: the surrogate is trained" in lines
    assert len(report.curve) == 12


@pytest.mark.parametrize("change", [{"resume": False}, {"seed": 1}], ids=["asked", "other inputs"])
def test_what_belongs_to_other_inputs_is_begun_anew(aligned, pairs, tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        run(aligned, pairs, tmp_path / "v", callbacks=(Interrupt(5),))
    lines = []
    run(aligned, pairs, tmp_path / "v", say=lines.append, **change)
    assert not [line for line in lines if "resuming" in line]
