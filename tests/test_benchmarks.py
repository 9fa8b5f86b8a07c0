"""The benchmarks' commands are known to work; what they measure here means nothing."""

import json
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from docs_text import ROOT
from typer.testing import CliRunner

from benchmarks import (
    commands,
    kernels_cases,
    kernels_cuda,
    kernels_registers,
    load_cuda,
    plan_cuda,
    runs,
)
from benchmarks.harness import NotVerified, Options, registry, row
from benchmarks.harness.registry import REGISTRY, Benchmark, find
from benchmarks.harness.rows import read
from benchmarks.kernels_occupancy import Usage, occupancy
from enchtable_vllm.errors import ConfigError

RESULTS = ROOT / "benchmarks" / "results"


class Sizes(Options):
    rounds: int = 3
    shapes: tuple[str, ...] = ("a",)


def plant(monkeypatch, *, right=True, device="cpu"):
    """A benchmark of our own, that takes no time."""

    def verify(_):
        if not right:
            raise NotVerified("planted", expected="4", got=5, fix="No speed is reported.")

    def measure(options):
        for provider, value in (("ours", 1.0), ("theirs", 2.0)):
            yield row("op", provider, options.shapes[0], "bf16", [value] * options.rounds)

    module = ModuleType("benchmarks.planted")
    module.__dict__.update(
        Options=Sizes, verify=verify, measure=measure, PEER="theirs", QUICK={"rounds": 1}
    )
    monkeypatch.setitem(sys.modules, "benchmarks.planted", module)
    planted = Benchmark("planted", "Nothing against nothing", device, 0)
    for where in (registry, commands):
        monkeypatch.setattr(where, "REGISTRY", (planted,))
    return module


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    return tmp_path / "planted.csv"


def invoke(*words):
    return CliRunner().invoke(commands.app, words)


def test_every_benchmark_keeps_the_contract():
    for benchmark in REGISTRY:
        module = benchmark.load()
        assert callable(module.verify)
        assert callable(module.measure)
        assert benchmark.peer
        for size in ("quick", "full"):
            benchmark.options(**benchmark.preset(size))
        for name, field in benchmark.options.model_fields.items():
            assert field.exclude or field.description, (benchmark.name, name)


def test_they_are_listed_with_their_options():
    assert all(benchmark.name in invoke("list").stdout for benchmark in REGISTRY)
    listed = json.loads(invoke("list", "--json").stdout)
    assert [one["name"] for one in listed] == [benchmark.name for benchmark in REGISTRY]
    told = json.loads(invoke("list", "load", "--json").stdout)["options"]
    assert told["rounds"]["default"] == find("load").options().rounds


def test_a_run_writes_rows_with_what_made_them(monkeypatch, results):
    plant(monkeypatch)
    done = invoke("run", "planted", "-o", "shapes=x,y")
    assert done.exit_code == 0, done.output
    ours, theirs = read(results)
    assert (ours.provider, ours.shape, ours.p50, ours.n) == ("ours", "x", 1.0, 3)
    assert ours.samples == (1.0, 1.0, 1.0)
    assert ours.command == "python -m benchmarks run planted -o shapes=x,y"
    assert ours.utc == theirs.utc
    assert "torch=" in ours.versions
    assert ours.device
    assert "0.5×" in done.stdout


@pytest.mark.parametrize("words", [["--quick"], ["--no-write"]])
def test_what_is_not_to_be_kept_is_not(monkeypatch, results, words):
    plant(monkeypatch)
    rows = json.loads(invoke("run", "planted", "--json", *words).stdout)
    assert [one["provider"] for one in rows] == ["ours", "theirs"]
    assert rows[0]["n"] == (1 if words == ["--quick"] else 3)
    assert not results.exists()


def test_a_wrong_answer_has_no_figures(monkeypatch, results):
    plant(monkeypatch, right=False)
    for words in (["run", "planted"], ["verify", "planted"]):
        done = invoke(*words)
        assert isinstance(done.exception, NotVerified)
        assert "op" not in done.stdout
    assert not results.exists()


def test_a_wrong_answer_halfway_has_none_either(monkeypatch, results):
    module = plant(monkeypatch)
    measure = module.measure

    def half(options):
        yield from measure(options)
        raise NotVerified("planted", expected="4", got=5, fix="")

    module.measure = half
    assert isinstance(invoke("run", "planted").exception, NotVerified)
    assert not results.exists()


def test_a_missed_bound_is_exit_code_three_and_its_figures_are_kept(monkeypatch, results):
    module = plant(monkeypatch)
    module.bounds = lambda rows: [f"{rows[0].provider} is slow"]
    done = invoke("run", "planted")
    assert done.exit_code == 3
    assert "ours is slow" in done.stderr
    assert len(read(results)) == 2
    assert invoke("run", "planted", "--quick").exit_code == 0  # a quick run claims nothing


def test_one_wrong_bit_of_the_addition_is_seen(monkeypatch):
    """The benchmark proper, with a kernel that is wrong in its last element."""
    right = kernels_cases.fused_add

    def wrong(*arguments, **more):
        merged, sums = right(*arguments, **more)
        merged.view(-1)[-1] *= 1.01
        return merged, sums

    variants = (kernels_cases.Variant(), kernels_cases.Variant(delta=torch.int8, keep=True))
    seen = []
    monkeypatch.setattr(
        kernels_cases, "fused_add", lambda *a, **k: seen.append(a[0]) or right(*a, **k)
    )
    kernels_cases.verify_variants(variants, "cpu")
    assert any(one.shape[-1] % 64 == 0 for one in seen if one.ndim == 2)  # whole blocks of scales
    monkeypatch.setattr(kernels_cases, "fused_add", wrong)
    with pytest.raises(NotVerified, match="1 elements with others"):
        kernels_cases.verify_variants(variants, "cpu")


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ([0, 0], 0, ""),
        ([0, 3], 3, "targets missed: planted-1\n"),
        ([3, 1], 1, "targets missed: planted-0\nfailed: planted-1\n"),
        ([0, -9], 1, "failed: planted-1\n"),
    ],
)
def test_what_failed_is_told_from_what_was_missed(capsys, codes, code, said):
    class Ends(runs.Wish):
        def command(self, name):
            number = codes[int(name[-1])]
            end = f"sys.exit({number})" if number >= 0 else f"os.kill(os.getpid(), {-number})"
            return [sys.executable, "-c", f"import os, sys; {end}"]

    wanted = [Benchmark(f"planted-{i}", "Nothing", "cpu", 0) for i in range(len(codes))]
    assert runs.run_all(wanted, Ends()) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("words", ["rounds=many", "colour=blue"])
def test_an_option_that_is_none_is_refused(monkeypatch, results, words):
    plant(monkeypatch)
    assert isinstance(invoke("run", "planted", "-o", words).exception, ConfigError)
    assert not results.exists()


def test_what_needs_a_gpu_is_skipped_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plant(monkeypatch, device="cuda")
    done = invoke("run", "--device", "cuda")
    assert done.exit_code == 0
    assert "planted: skipped: it needs a CUDA device" in done.stderr


def python(*words):
    command = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_refusal_is_one_message():
    done = python("run", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: benchmark: expected one of kernels, ")


def test_planning():
    before = {path: path.read_bytes() for path in RESULTS.iterdir()}
    done = python("run", "plan", "--quick", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(one["shape"], one["provider"]) for one in json.loads(done.stdout)}
    for what in ("96x96 flat", "80x320 decaying", "model of 1 layers, 96 wide"):
        for provider in ("authors' algorithm", "cold", "cached"):
            assert (what, provider) in found
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before


def test_the_peer_in_torch_is_the_same_sum():
    kernels_cuda.verify_peer(tuple(kernels_cases.variants()), "cpu")


def test_every_variant_is_measured_and_moves_the_bytes_that_it_holds():
    every = list(kernels_cases.variants())
    assert len(set(map(str, every))) == 32
    for variant in every:
        addition = variant.addition(variant.elements(2**20), "cpu")
        tensors = [addition.stored, addition.delta, addition.out, addition.scales]
        held = sum(t.numel() * t.itemsize for t in (*tensors, addition.keep_bits) if t is not None)
        counted = variant.bytes_an_element * addition.stored.numel()
        assert counted == pytest.approx(held, rel=1e-3), str(variant)


def test_registers_come_from_the_compiler(monkeypatch, tmp_path):
    """The program is the tests' own, tried in kernels/test_compile.py; here how it is read."""
    line = {
        "variant": ["bf16", "i8", 2, True, True], "registers": 40, "spills": 0,
        "warps": 4, "shared": 4096,
    }  # fmt: skip
    program = tmp_path / "compile.py"
    program.write_text(f"print('''{json.dumps(line)}''')\nprint('{{}}')")
    monkeypatch.setattr(kernels_registers, "_PROGRAM", program)
    found = {one.metric: one for one in kernels_registers.registers(90)}
    assert found["registers"].shape == "bf16 + int8, ragged, masked, stochastic"
    assert (found["registers"].p50, found["spills"].p50) == (40, 0)
    assert found["occupancy"].p50 == 0.75
    assert found["spills"].provider == "sm_90"
    assert "occupancy" not in {one.metric for one in kernels_registers.registers(86)}


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "blocks"),
    [
        # 32 · 128 = 4096 registers a warp: four in each quarter of 16384, so 16 warps, four blocks.
        (90, 4, 128, 16, 4),
        # 71 · 32 = 2272, rounded up to 2304: seven in each quarter, 28 warps.
        (90, 4, 71, 16, 7),
        # 73 · 32 = 2336, rounded up to 2560: six in each quarter; 2336 itself would go seven times.
        (90, 4, 73, 16, 6),
        # 140 · 32 = 4480, rounded up to 4608: three in each quarter, 12; 14 in all of them as one.
        (90, 1, 140, 0, 12),
        # 32 registers: 16 warps in each quarter, all 64.
        (100, 4, 32, 16, 16),
        # Single warps: no more than 32 blocks, half of the warps.
        (80, 1, 32, 0, 32),
        # 16 KiB and the 1 KiB that is reserved: nine in 164 KiB, thirteen in 228.
        (80, 4, 32, 16 * 1024, 9),
        (90, 4, 32, 16 * 1024, 13),
        # One byte more is 128 more: 17536 bytes, thirteen still; 13 · 17536 = 227968 ≤ 233472.
        (100, 4, 32, 16 * 1024 + 1, 13),
    ],
)
def test_occupancy_is_what_registers_shared_memory_and_warps_allow(
    capability, warps, registers, shared, blocks
):
    usage = Usage(warps, registers, shared)
    assert occupancy(usage, capability) == blocks * warps / 64


def on_the_cpu(module, tmp_path, **more):
    """A benchmark of a GPU, tried where there is none."""
    return module.Options(**{**module.QUICK, "device": "cpu", "scratch": tmp_path, **more})


def test_planning_on_a_gpu_as_on_the_cpu(tmp_path):
    options = on_the_cpu(plan_cuda, tmp_path, shrink=32)
    plan_cuda.verify(options)
    found = {(one.shape, one.provider) for one in plan_cuda.measure(options)}
    one, two = (f"{layers} of Llama-3.1-8B, attention" for layers in ("1 layer", "2 layers"))
    assert found == {
        (one, "cold"), (one, "cached"), (one, "authors' algorithm"), (two, "cold"), (two, "cached")
    }  # fmt: skip


def test_a_plan_that_differs_on_a_gpu_has_no_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_cuda, "TOLERANCE", -1.0)
    with pytest.raises(NotVerified, match="the CPU's interference"):
        plan_cuda.verify(on_the_cpu(plan_cuda, tmp_path, shrink=32))


def test_loading_onto_a_gpu_as_on_the_cpu(tmp_path, monkeypatch):
    options = on_the_cpu(load_cuda, tmp_path)
    load_cuda.verify(options)
    found = {one.provider: one for one in load_cuda.measure(options)}
    assert found.keys() == {"safetensors", "enchtable bf16", "enchtable int8"}
    assert {one.shape for one in found.values()} == {"tiny, random, warm"}

    def unmerged(case, _, device):
        return load_cuda.plain(case, device)

    monkeypatch.setattr(load_cuda, "merged", unmerged)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(NotVerified, match="others in 8 tensors"):  # four in each of two layers
        load_cuda.verify(options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "providers"),
    [
        ("kernels-cuda", {"copy", "fused_add"}),
        ("plan-cuda", {"authors' algorithm", "cold", "cached"}),
        ("load-cuda", {"safetensors", "enchtable bf16", "enchtable int8"}),
    ],
)
def test_what_is_measured_on_a_gpu(name, providers):
    done = python("run", name, "--quick", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {one["provider"] for one in json.loads(done.stdout)} >= providers


def test_tables_are_written_where_there_is_no_vllm():
    """As in the environment for a GPU: a page has tables of every benchmark."""
    program = (
        "import sys; sys.modules['vllm'] = None\n"
        "from benchmarks.harness.registry import REGISTRY\n"
        "print(sum(len(one.shown('TABLES')) for one in REGISTRY))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10
