"""Cached factors: the same plan, byte for byte, or an error; never something else."""

import json
import os
import shutil
import subprocess
import sys

import models
import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from test_interference import KINDS, exact_low_rank, gaussian, low_rank

from enchtable_vllm.checkpoint import Location, locate
from enchtable_vllm.errors import ConfigError, SafetyVectorError
from enchtable_vllm.plan import measure
from enchtable_vllm.vector import SafetyVector, add_factors, build_vector, factor_files, factors
from enchtable_vllm.vector.factor_files import FactorFiles, open_factors
from enchtable_vllm.vector.workers import workers

Q = "model.layers.0.self_attn.q_proj.weight"
FILE = "safety_vector_factors.safetensors"


def add(folder, gamma=0.5, **options):
    options.setdefault("max_shard_bytes", 10**9)
    return add_factors(SafetyVector.open(folder), rank_fraction=gamma, **options)


@pytest.fixture
def factored(damaged):
    """A family to damage whose vector has factors."""
    add(damaged.vector)
    return damaged


@pytest.fixture
def factorings(monkeypatch):
    """Counts what planning factors itself."""
    calls = []

    def counted(matrix, rank_fraction):
        calls.append(matrix.shape)
        return factors.factor(matrix, rank_fraction)

    monkeypatch.setattr(measure, "factor", counted)
    return calls


def plan(family, **options):
    return models.plan_for(family.task, family.base, family.vector, **options).to_json()


def test_the_commands_make_what_the_library_makes(family, factored, tmp_path):
    """'vector build --factors', and 'vector factor' on a vector without."""
    ends = ("--aligned", family.aligned, "--surrogate", family.surrogate)
    built = json.loads(
        run("vector", "build", *ends, "-o", tmp_path / "at build", "--factors", "--json")[0]
    )
    size = sum(t.nbytes for t in load_file(factored.vector / FILE).values())
    assert built["factors"] == {"rank_fraction": 0.5, "bytes": size}
    run("vector", "build", *ends, "-o", tmp_path / "later")
    assert not (tmp_path / "later" / FILE).exists()
    out, _ = run("vector", "factor", tmp_path / "later", "--jobs", "2")
    assert f"for rank fraction 0.5 ({size:,} bytes)" in out
    for folder in (tmp_path / "at build", tmp_path / "later"):
        for name in (FILE, "safety_vector.json"):
            assert (folder / name).read_bytes() == (factored.vector / name).read_bytes()
        run("vector", "verify", folder)
    flip(tmp_path / "later")
    _, error = run("vector", "verify", tmp_path / "later", code=1)
    assert "Make them again with 'enchtable vector factor'" in error


def test_options_of_the_commands(family, tmp_path):
    ends = ("--aligned", family.aligned, "--surrogate", family.surrogate)
    quarter = ("--rank-fraction", "0.25")
    run("vector", "build", *ends, "-o", tmp_path / "v", "--factors", *quarter)
    assert SafetyVector.open(tmp_path / "v").manifest.factors.rank_fraction == 0.25
    told = json.loads(
        run("vector", "factor", tmp_path / "v", "--json", "--max-shard-gb", "0.0002")[0]
    )
    assert told["factors"]["rank_fraction"] == 0.5
    assert len(list((tmp_path / "v").glob("*factors-0*"))) > 3
    before = {path.name: path.read_bytes() for path in (tmp_path / "v").iterdir()}
    _, error = run("vector", "factor", tmp_path / "v", "--rank-fraction", "nan", code=1)
    assert error.strip().startswith("ConfigError: rank fraction: expected a number above 0")
    run("vector", "factor", tmp_path / "nothing", code=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "v").iterdir()} == before


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_plan_from_factors_is_the_same_plan(family, factored, factorings, jobs):
    assert plan(factored, beta=0.5, jobs=jobs) == family.plan.read_text()
    assert len(factorings) == 8  # the task's; without them it is twice as many
    plan(family)
    assert len(factorings) == 8 + 16


def test_another_process_with_other_threads_writes_the_same_bytes(family, factored):
    code = (
        "import sys, models; from pathlib import Path; p = [Path(x) for x in sys.argv[1:]]; "
        "sys.stdout.write(models.plan_for(*p, beta=0.5).to_json())"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, *map(str, (factored.task, factored.base, factored.vector))],
        env={**os.environ, "OMP_NUM_THREADS": "5"},
        check=True, capture_output=True, text=True, cwd="tests",
    )  # fmt: skip
    assert again.stdout == family.plan.read_text()


def test_workers_leave_the_threads_and_the_precision_as_they_were(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # so does a CPU worker of vLLM
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with workers(2) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
        with workers(1) as pool:
            pass
        assert torch.get_num_threads() == before[0]
    finally:
        torch.set_float32_matmul_precision(before[1])


def test_a_vector_is_what_it_was(family, factored):
    before, after = SafetyVector.open(family.vector), SafetyVector.open(factored.vector)
    assert after.fingerprint == before.fingerprint
    assert after.manifest.model_copy(update={"factors": None}) == before.manifest
    for name in after.tensors:
        assert torch.equal(after.read(name).float(), before.read(name).float())


def test_factors_at_build_are_factors_added_later(family, factored, tmp_path):
    ends = locate(family.aligned), locate(family.surrogate)
    report = build_vector(*ends, tmp_path / "v", factors=0.5)
    assert report.manifest == SafetyVector.open(factored.vector).manifest
    assert (tmp_path / "v" / FILE).read_bytes() == (factored.vector / FILE).read_bytes()
    with pytest.raises(ConfigError, match="rank fraction"):
        build_vector(*ends, tmp_path / "w", factors=1.5)
    assert not (tmp_path / "w").exists()


def test_an_int8_vector_has_factors_too(damaged, factorings):
    ends = locate(damaged.aligned), locate(damaged.surrogate)
    build_vector(*ends, damaged.vector, dtype="int8", overwrite=True)
    without = plan(damaged)
    add(damaged.vector)
    assert plan(damaged) == without
    assert len(factorings) == 16 + 8


def test_sharded_factors_and_factors_replaced(factored, family):
    add(factored.vector, max_shard_bytes=200_000)
    files = {path.name for path in factored.vector.glob("*factors*")}
    assert FILE not in files
    assert len(files) > 3
    assert plan(factored, beta=0.5) == family.plan.read_text()
    add(factored.vector)
    assert {path.name for path in factored.vector.glob("*factors*")} == {FILE}
    assert plan(factored, beta=0.5) == family.plan.read_text()


def test_factors_of_another_gamma_or_left_out_of_a_download_are_not_used(factored, factorings):
    before = plan(factored, rank_fraction=0.25)
    assert len(factorings) == 16
    vector = SafetyVector.open(factored.vector)
    assert open_factors(vector, 0.25, "cpu") is None
    assert open_factors(vector, 0.5, "cuda") is None
    assert open_factors(vector, 0.5, "cpu") is not None
    (factored.vector / FILE).unlink()
    assert open_factors(SafetyVector.open(factored.vector), 0.5, "cpu") is None
    assert plan(factored, rank_fraction=0.25) == before


def test_every_kind_of_tensor(tmp_path, factorings):
    """Norms, stacks, rank-deficient and zero slices, sides of one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"norm.weight": (30,), "mlp.experts.up": (3, 80, 100), "mlp.side": (1, 40)}
    for kind, noise in (("aligned", 0.0), ("surrogate", 1e-3), ("task", 2e-3)):
        tensors = {}
        for name, shape in shapes.items():
            tensors[name] = torch.ones(shape) + torch.randn(shape, generator=generator) * noise
        if kind == "surrogate":
            stack = tensors["mlp.experts.up"]
            stack[0] = 1.0 + exact_low_rank((80, 100), generator)
            stack[1] = 1.0
        (tmp_path / kind).mkdir()
        save_file(tensors, tmp_path / kind / "model.safetensors")
    ends = [locate(tmp_path / kind) for kind in ("aligned", "surrogate")]
    build_vector(*ends, tmp_path / "v", scope="all", dtype="fp32")
    paths = tmp_path / "task", tmp_path / "aligned", tmp_path / "v"
    without = models.plan_for(*paths)
    assert len(factorings) == 8
    manifest = add(tmp_path / "v")
    assert [m.rank for m in manifest.factors.tensors["mlp.experts.up"]] == [5, 0, 40]
    assert models.plan_for(*paths).to_json() == without.to_json()
    assert len(factorings) == 12


def flip(folder):
    data = bytearray((folder / FILE).read_bytes())
    data[-5] ^= 1
    (folder / FILE).write_bytes(data)


def truncate(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])


def reshape(folder):
    tensors = load_file(folder / FILE)
    tensors[f"{Q}.0.left"] = tensors[f"{Q}.0.left"][:, 1:].contiguous()
    save_file(tensors, folder / FILE)


def lose_a_tensor(folder):
    tensors = load_file(folder / FILE)
    del tensors[f"{Q}.0.left"]
    save_file(tensors, folder / FILE)


def lose_a_shard(folder):
    add(folder, max_shard_bytes=200_000)
    next(folder.glob("*factors-00002-of*")).unlink()


def edited(*keys, value):
    def edit(folder):
        document = json.loads((folder / "safety_vector.json").read_text())
        inner = document["factors"]
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / "safety_vector.json").write_text(json.dumps(document))

    return edit


def not_finite(folder):
    """Its digest in order: written so."""
    broken = torch.full((128, 256), torch.nan)

    def factor(matrix, rank_fraction):
        found = factors.factor(matrix, rank_fraction)
        return factors.Factors(found.left, broken[: found.rank], found.exponent, found.rung)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factor_files, "factor", factor)
        add(folder)


DAMAGE = {
    "flipped bit": flip,
    "truncated": truncate,
    "shape": reshape,
    "tensor missing": lose_a_tensor,
    "shard missing": lose_a_shard,
    "stale": edited("vector", value="blake3:" + "1" * 64),
    "exponent": edited("tensors", Q, 0, "exponent", value=3),
    "rank": edited("tensors", Q, 0, "rank", value=7),
    "rung": edited("tensors", Q, 0, "rung", value="svd64"),
    "name missing": edited("tensors", value={}),
    "not finite": not_finite,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_factors_are_refused_with_the_cure(factored, damage):
    damage(factored.vector)
    with pytest.raises(SafetyVectorError, match="safety_vector_factors") as raised:
        plan(factored)
    assert "enchtable vector factor" in str(raised.value)
    add(factored.vector)
    plan(factored)


def test_factors_of_a_vector_that_was_rebuilt_are_stale(factored, tmp_path):
    """The manifest's entry and the files carried over to another content."""
    entry = json.loads((factored.vector / "safety_vector.json").read_text())["factors"]
    file = shutil.copyfile(factored.vector / FILE, tmp_path / FILE)
    shutil.rmtree(factored.vector)
    ends = locate(factored.aligned), locate(factored.surrogate)
    build_vector(*ends, factored.vector, dtype="fp32")
    shutil.copyfile(file, factored.vector / FILE)
    document = json.loads((factored.vector / "safety_vector.json").read_text())
    (factored.vector / "safety_vector.json").write_text(json.dumps({**document, "factors": entry}))
    with pytest.raises(SafetyVectorError, match="factors of blake3"):
        plan(factored)


def test_a_failure_leaves_the_vector_as_it_was(factored, monkeypatch):
    before = {path.name: path.read_bytes() for path in factored.vector.iterdir()}

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(factor_files, "factor", fail)
    with pytest.raises(KeyboardInterrupt):
        add(factored.vector)
    assert {path.name: path.read_bytes() for path in factored.vector.iterdir()} == before


def test_a_hub_cache_and_a_bad_gamma_are_refused(family):
    opened = SafetyVector(Location(family.vector, "org/name", "0" * 40))
    with pytest.raises(ConfigError, match="--local-dir"):
        add_factors(opened, max_shard_bytes=10**9)
    with pytest.raises(ConfigError, match="rank fraction"):
        add(family.vector, gamma=0.0)
    with pytest.raises(ConfigError, match="jobs"):
        add(family.vector, jobs=0)


def test_a_folder_in_the_place_of_the_file_is_refused_before_the_work(factored, monkeypatch):
    monkeypatch.setattr(factor_files, "factor", None)  # the work
    (factored.vector / FILE).unlink()
    (factored.vector / FILE).mkdir()
    with pytest.raises(ConfigError, match=f"a folder of the name '{FILE}'"):
        add(factored.vector)


def test_factors_are_read_into_memory_of_their_own(factored):
    """What was verified cannot change under a plan, even if the file does."""
    (found,) = FactorFiles(SafetyVector.open(factored.vector)).read(Q)
    before = found.left.clone(), found.right.clone()
    size = (factored.vector / FILE).stat().st_size
    with (factored.vector / FILE).open("r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(found.left, before[0])
    assert torch.equal(found.right, before[1])


@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
def test_the_bound_is_one(kind):
    """What it skips, the fp32 rung would have refused."""
    for seed, shape in enumerate([(80, 80), (100, 300), (128, 130)]):
        matrix = kind(shape, torch.Generator().manual_seed(seed))
        sigma = torch.linalg.svdvals(matrix.double())
        for wanted in (2, shape[0] // 4, shape[0] // 2, shape[0]):
            true = float(sigma[wanted - 1] / sigma[0])
            assert factors._kept_at_most(matrix @ matrix.mT, wanted) >= true * (1 - 1e-3) - 1e-3


def test_a_hopeless_rung_is_not_tried(monkeypatch):
    """A spectrum like that of real fine-tunes: a few strong directions, then a slow decay."""
    tried, eigh = [], torch.linalg.eigh

    def watched(gram):
        if len(gram) >= 150:  # the strong directions are sought among fewer
            tried.append((len(gram) == 200, gram.dtype))
        return eigh(gram)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    generator = torch.Generator().manual_seed(3)
    strong = low_rank((200, 300), generator)
    assert factors.factor(strong, 0.5).rung == "deflated32"
    assert tried == [(False, torch.float32)]  # of what is left of it, which is smaller
    monkeypatch.setattr(factors, "_by_deflation", lambda *_: None)
    assert factors.factor(strong, 0.5).rung == "gram64"
    assert tried[1:] == [(True, torch.float64)]
    assert factors.factor(gaussian((200, 300), generator), 0.5).rung == "gram32"
    assert tried[2:] == [(True, torch.float32)]


@pytest.mark.parametrize("gpu", [None, 3])
def test_threads_work_on_the_gpu_of_their_caller(monkeypatch, gpu):
    """To a new thread ``cuda`` is the first one, and a second process would be seen there."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with workers(2) as pool:
        assert list(pool.map(abs, range(-8, 0))) == list(range(8, 0, -1))
    assert set(chosen) == ({gpu} if gpu else set())
