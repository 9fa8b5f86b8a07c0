"""An interrupted plan continues, and what it writes is what an uninterrupted one writes."""

import fcntl
import json
import shutil
import signal
import subprocess
import time

import models
import pytest
import torch
from commands import ENCHTABLE
from safetensors.torch import load_file, save_file

from enchtable_vllm.checkpoint import Location, locate
from enchtable_vllm.errors import MismatchError
from enchtable_vllm.plan import PlanOptions, compute_plan, measure
from enchtable_vllm.plan.cache import cached_plan
from enchtable_vllm.plan.journal import Journal
from enchtable_vllm.progress import silent
from enchtable_vllm.vector import SafetyVector, build_vector, factors

LAYERS = 24


@pytest.fixture(scope="module")
def long_work(tmp_path_factory):
    """Checkpoints whose plan takes a second or more, (task, base, vector), and that plan."""
    folder = tmp_path_factory.mktemp("long")
    generator = torch.Generator().manual_seed(0)
    aligned = {
        f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(400, 400, generator=generator)
        for i in range(LAYERS)
    }
    for kind, noise in (("base", 0.0), ("surrogate", 1e-2), ("task", 2e-2)):
        (folder / kind).mkdir()
        tensors = {
            name: tensor + torch.randn(tensor.shape, generator=generator) * noise
            for name, tensor in aligned.items()
        }
        save_file(tensors, folder / kind / "model.safetensors")
    build_vector(locate(folder / "base"), locate(folder / "surrogate"), folder / "vector")
    paths = folder / "task", folder / "base", folder / "vector"
    return paths, models.plan_for(*paths).to_json()


def command(work, out, *more):
    names = ("--task-model", "--base-model", "--safety-vector")
    pairs = [text for pair in zip(names, map(str, work), strict=True) for text in pair]
    return [str(ENCHTABLE), "plan", *pairs, "-o", str(out), "--jobs", "1", *more]


def interrupted(work, out, how):
    """A real process, stopped once three matrices are done; its exit code."""
    journal = out.with_name(f".{out.name}.journal")
    process = subprocess.Popen(
        command(work, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not journal.exists() or len(journal.read_bytes().splitlines()) < 4:
            assert process.poll() is None, "finished before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(how)
        return process.wait(60)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_a_stopped_process_is_continued(long_work, tmp_path, how):
    paths, expected = long_work
    out = tmp_path / "plan.json"
    assert interrupted(paths, out, how) != 0
    journal = tmp_path / ".plan.json.journal"
    assert journal.exists()
    assert not out.exists()
    done = subprocess.run(command(paths, out), capture_output=True, text=True, check=True)
    words = done.stderr.split("resuming: ")[1].split()
    assert 3 <= int(words[0]) < LAYERS
    assert words[1:6] == ["of", str(LAYERS), "matrices", "were", "done"]
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json"}
    assert out.read_text() == expected


class Stopped(BaseException):
    """Like a signal, inside the process."""


def stop_after(count):
    def progress(_name, done, _total):
        if done == count:
            raise Stopped

    return progress


@pytest.fixture
def computed(monkeypatch):
    """The shapes of what was factored."""
    calls = []

    def counted(matrix, rank_fraction):
        calls.append(tuple(matrix.shape))
        return factors.factor(matrix, rank_fraction)

    monkeypatch.setattr(measure, "factor", counted)
    return calls


@pytest.fixture
def stopped(damaged, tmp_path, computed):
    """A plan that was stopped half-way: its journal. The family is the test's own."""
    path = tmp_path / "journal"
    with pytest.raises(Stopped):
        planned(damaged, path, progress=stop_after(12))
    assert 0 < len(computed) < 16
    computed.clear()
    return path


def planned(family, path, *, announce=None, resume=True, progress=None, **options):
    options.setdefault("jobs", 1)
    with Journal(path, resume=resume, announce=announce) as journal:
        return compute_plan(
            Location(family.task),
            Location(family.base),
            SafetyVector.open(family.vector),
            PlanOptions(**options),
            journal=journal,
            progress=progress or silent,
        ).to_json()


def fresh(family, path, **options):
    return planned(family, path.with_name("another"), **options)


def done_lines(path):
    return path.read_bytes().splitlines()[1:]


def test_only_what_is_missing_is_computed(damaged, stopped, computed):
    announced = []
    count = len(done_lines(stopped))
    text = planned(damaged, stopped, announce=lambda *numbers: announced.append(numbers))
    assert announced == [(count, 8)]
    assert len(computed) == 16 - 2 * count
    assert not stopped.exists()
    assert text == fresh(damaged, stopped)


def test_another_beta_resumes_another_gamma_does_not(damaged, stopped, computed):
    count = len(done_lines(stopped))
    copy = shutil.copyfile(stopped, stopped.with_name("copy"))
    text = planned(damaged, stopped, beta=0.7)
    assert len(computed) == 16 - 2 * count
    assert text == fresh(damaged, stopped, beta=0.7)
    computed.clear()
    planned(damaged, copy, rank_fraction=0.25)
    assert len(computed) == 16


def test_no_resume_begins_anew(damaged, stopped, computed):
    announced = []
    planned(damaged, stopped, resume=False, announce=lambda *n: announced.append(n))
    assert len(computed) == 16
    assert announced == []


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_last_line_is_dropped(damaged, stopped, computed, cut):
    count = len(done_lines(stopped))
    stopped.write_bytes(stopped.read_bytes()[:-cut])
    with pytest.raises(Stopped):  # stopped again: what is written after the torn line is whole
        planned(damaged, stopped, progress=stop_after(12))
    assert len(computed) == 2
    assert len(done_lines(stopped)) == count
    computed.clear()
    text = planned(damaged, stopped)
    assert len(computed) == 16 - 2 * count
    assert text == fresh(damaged, stopped)


def test_a_changed_line_is_dropped(damaged, stopped, computed):
    lines = stopped.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"a":[', b'"a":[1')
    stopped.write_bytes(b"".join(lines))
    text = planned(damaged, stopped)
    assert len(computed) == 16 - 2 * (len(lines) - 2)
    assert text == fresh(damaged, stopped)


def test_a_journal_of_nonsense_is_begun_anew(damaged, tmp_path):
    for junk in (b"", b"\n", b"\xff" * 100, b"0" * 64 + b" {}\n"):
        (tmp_path / "junk").write_bytes(junk)
        assert planned(damaged, tmp_path / "junk") == fresh(damaged, tmp_path / "junk")


@pytest.mark.parametrize("side", ["task", "base"])
def test_bytes_that_changed_unseen_by_the_fingerprint_are_computed_again(
    damaged, stopped, computed, side
):
    """The sampled fingerprint is the same; the tensor's own digest is not."""
    name = json.loads(done_lines(stopped)[0].partition(b" ")[2])["name"]
    folder = damaged.task if side == "task" else damaged.base
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = tensors[name].clone()
    changed.view(-1)[4000] *= 3
    data = path.read_bytes()
    before, after = (
        t.view(-1).view(torch.uint8).numpy().tobytes() for t in (tensors[name], changed)
    )
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))
    count = len(done_lines(stopped))
    text = planned(damaged, stopped)
    assert len(computed) == 16 - 2 * (count - 1)
    assert text == fresh(damaged, stopped)


def test_a_refusal_leaves_no_journal(family, tmp_path):
    other = models.tiny_llama(tmp_path / "other", seed=9)
    with (
        pytest.raises(MismatchError, match="unrelated"),
        Journal(tmp_path / "journal") as journal,
    ):
        compute_plan(
            Location(family.task),
            Location(other),
            SafetyVector.open(family.vector),
            PlanOptions(allow_other_base=True),
            journal=journal,
        )
    assert not (tmp_path / "journal").exists()


def test_two_processes_do_not_share_a_journal(family, tmp_path):
    out = tmp_path / "plan.json"
    with (tmp_path / ".plan.json.journal").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = subprocess.run(
            command((family.task, family.base, family.vector), out),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "no other process planning" in done.stderr
    assert not out.exists()


def test_a_plan_computed_at_load_resumes_too(family, computed):
    inputs = (
        Location(family.task),
        Location(family.base),
        SafetyVector.open(family.vector),
        PlanOptions(jobs=1),
    )
    with pytest.raises(Stopped):
        cached_plan(*inputs, progress=stop_after(12))
    found = len(computed)
    assert 0 < found < 16
    plan, *_ = cached_plan(*inputs)
    assert len(computed) <= 16 + 2  # a matrix that was under way may have been done twice
    assert plan.to_json() == compute_plan(*inputs).to_json()
