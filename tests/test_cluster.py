"""Plans whose linear algebra runs on a real Ray cluster: two workers of this machine."""

import dataclasses
import json
import subprocess
import threading
from contextlib import contextmanager

import models
import psutil
import pytest
import ray
import torch
from commands import ENCHTABLE
from safetensors.torch import save_file

from enchtable_vllm.checkpoint import Location, locate, tensor_digest
from enchtable_vllm.errors import ConfigError, MismatchError
from enchtable_vllm.plan import PlanOptions, cluster, compute_plan
from enchtable_vllm.plan.journal import Journal
from enchtable_vllm.vector import SafetyVector, build_vector

LAYERS = 12
PROJECTION = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """(task, base, vector) whose plan takes seconds."""
    folder = tmp_path_factory.mktemp("work")
    generator = torch.Generator().manual_seed(0)

    def normal(side):
        return torch.randn(side, side, generator=generator)

    aligned = {PROJECTION.format(i): normal(600) for i in range(LAYERS)}
    for kind, noise in (("base", 0.0), ("surrogate", 1e-2), ("task", 2e-2)):
        (folder / kind).mkdir()
        tensors = {name: tensor + normal(600) * noise for name, tensor in aligned.items()}
        save_file(tensors, folder / kind / "model.safetensors")
    build_vector(locate(folder / "base"), locate(folder / "surrogate"), folder / "vector")
    return folder / "task", folder / "base", folder / "vector"


@pytest.fixture(scope="module")
def expected(paths):
    return models.plan_for(*paths).to_json()


@pytest.fixture(scope="module", autouse=True)
def two_workers():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def planned(paths, **more):
    task, base, vector = paths
    options = PlanOptions(executor="ray")
    inputs = Location(task), Location(base), SafetyVector.open(vector)
    return compute_plan(*inputs, options, **more).to_json()


def inputs(paths, device="cpu"):
    fingerprint = SafetyVector.open(paths[2]).fingerprint
    return cluster.Inputs(*paths, fingerprint, 0.5, device)


def at_work():
    """The workers that have a task in hand."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::_terms" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def meanwhile(look):
    """Call ``look`` with the workers that have a task in hand, again and again."""
    done = threading.Event()

    def watch():
        while not done.wait(0.005):
            look(at_work())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def test_the_plan_is_the_one_that_threads_make(paths, expected):
    seen = set()
    with meanwhile(lambda workers: seen.update(worker.pid for worker in workers)):
        assert planned(paths) == expected
    assert len(seen) >= 2


def test_a_killed_worker_changes_nothing(paths, expected):
    killed = []

    def kill_one(workers):
        if workers and not killed:
            workers[0].kill()
            killed.append(workers[0].pid)

    with meanwhile(kill_one):
        assert planned(paths) == expected
    assert len(killed) == 1


def test_an_interrupted_plan_is_continued_on_another_executor(paths, expected, tmp_path):
    class Stopped(BaseException):
        pass

    def progress(_name, done, _total):
        if done == LAYERS // 2:
            raise Stopped

    with pytest.raises(Stopped), Journal(tmp_path / "journal") as journal:
        planned(paths, journal=journal, progress=progress)
    announced = []
    with Journal(tmp_path / "journal", announce=lambda *of: announced.append(of)) as journal:
        task, base, vector = paths
        made = compute_plan(
            Location(task), Location(base), SafetyVector.open(vector), PlanOptions(),
            journal=journal,
        )  # fmt: skip
    assert made.to_json() == expected
    ((done, total),) = announced
    assert LAYERS // 2 <= done <= total == LAYERS


def test_a_worker_refuses_other_bytes_than_the_planning_process_has(paths):
    name = PROJECTION.format(0)
    other = tensor_digest(torch.zeros(1))
    with cluster.cluster(inputs(paths)) as machines:
        assert machines.slots == 2
        with pytest.raises(MismatchError, match=r"q_proj.*the same files"):
            machines.terms(name, (other, other, other))


def test_a_worker_refuses_another_vector_than_the_planning_process_has(paths):
    """Of the same values, perhaps, and of other scales."""
    given = dataclasses.replace(inputs(paths), vector_fingerprint="blake3:0")
    with (
        cluster.cluster(given) as machines,
        pytest.raises(MismatchError, match=r"safety vector.*the same files"),
    ):
        machines.terms(PROJECTION.format(0), ("", "", ""))


def test_a_worker_refuses_to_compute_with_other_versions(paths, monkeypatch):
    monkeypatch.setattr(cluster, "_versions", lambda: {"torch": "1.0"})
    with (
        cluster.cluster(inputs(paths)) as machines,
        pytest.raises(MismatchError, match=r"worker of the Ray cluster.*1\.0"),
    ):
        machines.terms(PROJECTION.format(0), ("", "", ""))


def test_a_cluster_without_a_gpu_is_refused_for_one(paths):
    with (
        pytest.raises(ConfigError, match="has a GPU"),
        cluster.cluster(inputs(paths, device="cuda")),
    ):
        pass


def test_what_a_worker_cannot_read_comes_back_as_its_own_error(paths, tmp_path):
    given = inputs((tmp_path, *paths[1:]))
    with (
        cluster.cluster(given) as machines,
        pytest.raises(Exception, match=r"task model .*expected") as caught,
    ):
        machines.terms(PROJECTION.format(0), ("", "", ""))
    assert type(caught.value).__module__ == "enchtable_vllm.errors"


def test_on_the_command_line(paths, expected, tmp_path):
    """It finds the cluster that runs on this machine by itself."""
    out = tmp_path / "plan.json"
    names = ("--task-model", "--base-model", "--safety-vector")
    pairs = [text for pair in zip(names, map(str, paths), strict=True) for text in pair]
    command = [str(ENCHTABLE), "plan", *pairs, "-o", str(out), "--executor", "ray", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["merged"] == LAYERS
    assert out.read_text() == expected
