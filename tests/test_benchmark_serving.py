"""What the benchmarks of serving make of figures, and that they find a slowdown that is there."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import adapters, plant, serving
from benchmarks.harness import NotVerified, row
from benchmarks.harness.interval import Ratio
from benchmarks.harness.paired import paired_ratio, verdict
from benchmarks.served import small_case
from benchmarks.structure import differences
from benchmarks.vllm_bench import TOKENS, Ask, figures, offline_figures

ROOT = Path(__file__).parent.parent
ASK = Ask(clients=2, requests=4, prompt_tokens=8, output_tokens=16)
#: As `vllm bench serve` of vLLM 0.32 reports them.
REPORTED = {
    "duration": 2.0, "completed": 4, "failed": 0, "total_output_tokens": 64,
    "output_throughput": 32.0, "mean_ttft_ms": 9.0,
    **{f"p{q}_{what}_ms": value * q for q in (50, 95, 99)
       for what, value in (("ttft", 1.0), ("tpot", 2.0), ("e2el", 4.0))},
}  # fmt: skip


def turns(slowdown, *, pairs=24, starts=3, noise=0.01, seed=0):
    """Two servers' seconds: a machine whose speed drifts, noise, and a turn that was disturbed."""
    dice = np.random.default_rng(seed)
    machine = np.repeat(np.exp(dice.normal(0, 0.2, pairs)), 2).reshape(pairs, 2)
    placement = np.repeat(np.exp(dice.normal(0, 0.002, (starts, 2))), pairs // starts, axis=0)
    seconds = machine * placement * np.exp(dice.normal(0, noise, (pairs, 2)))
    seconds[3, 0] *= 5
    return seconds[:, 0] * (1 + slowdown), seconds[:, 1]


@pytest.mark.parametrize(("slowdown", "said"), [(0.0, "holds"), (0.05, "fails"), (-0.05, "fails")])
def test_a_slowdown_is_found_and_none_is_not(slowdown, said):
    found = [paired_ratio(*turns(slowdown, seed=seed), blocks=3) for seed in range(20)]
    outcomes = [verdict(ratio, 0.98, 1.02) for ratio in found]
    assert outcomes.count(said) >= 17
    assert not {"holds", "fails"} - {said} & set(outcomes)
    covered = sum(one.low <= 1 + slowdown <= one.high for one in found)
    assert covered >= 16  # of 19 expected: blocks are few


def test_what_cannot_be_decided_is_not():
    wide = paired_ratio(*turns(0.0, noise=0.3), blocks=3)
    assert wide.low < 0.98
    assert verdict(wide, 0.98, 1.02) == "undecided"
    few = paired_ratio([1.0] * 5, [1.0] * 5)
    assert few == Ratio(1.0)
    assert verdict(few, 0.98, 1.02) == "undecided"


def test_pairs_see_what_medians_do_not():
    ours, theirs = turns(0.05)
    ratio = paired_ratio(ours, theirs)
    assert ratio.value == pytest.approx(1.05, abs=0.015)
    backwards = paired_ratio(theirs, ours)
    assert ratio.value * backwards.value == pytest.approx(1)
    shuffled = paired_ratio(ours, np.random.default_rng(1).permutation(theirs))
    assert shuffled.high - shuffled.low > 3 * (ratio.high - ratio.low)


def test_starts_that_differ_widen_the_interval():
    ratios = np.repeat([0.95, 1.0, 1.05], 8) * np.exp(np.random.default_rng(0).normal(0, 0.005, 24))
    one, three = (paired_ratio(ratios, np.ones(24), blocks) for blocks in (1, 3))
    assert three.high - three.low > 1.5 * (one.high - one.low)


def test_figures_are_those_that_vllm_reports():
    found = figures(REPORTED, ASK)
    assert found["TTFT, p50"] == pytest.approx(0.05)
    assert found["TPOT, p95"] == pytest.approx(0.19)
    assert found["end to end, p99"] == pytest.approx(0.396)
    assert found[TOKENS] == 32.0
    assert set(serving.CLAIMED) <= set(found)
    assert len(found) == 10


@pytest.mark.parametrize(
    "wrong", [{"failed": 1}, {"completed": 3}, {"total_output_tokens": 63}], ids=str
)
def test_a_round_that_is_not_whole_has_no_figures(wrong):
    with pytest.raises(NotVerified, match="requests answered, failed, and tokens"):
        figures({**REPORTED, **wrong}, ASK)


def test_figures_of_the_offline_benchmarks():
    assert offline_figures("latency", {"latencies": [3.0, 1.0, 2.0]}, ASK) == {"batch, p50": 2.0}
    assert offline_figures("throughput", {"elapsed_time": 2.0}, ASK) == {TOKENS: 32.0}


def rows(slowdown, metric="TPOT, p50"):
    shape = "SmolLM2-135M-Instruct, 4 clients, 3 starts"
    return [
        row("serve", provider, shape, "bf16", list(values), metric=metric)
        for provider, values in zip(("merged", "unmerged"), turns(slowdown), strict=True)
    ]


def test_the_claim_is_about_medians():
    assert list(serving.bounds(rows(0.0))) == []
    against_plain = [
        dataclasses.replace(one, provider=name)
        for one, name in zip(rows(0.05), (serving.PEER, serving.PLAIN), strict=True)
    ]
    assert list(serving.bounds(against_plain)) == []
    (missed,) = serving.bounds(rows(0.05))
    assert re.search(r"4 clients, 3 starts: TPOT, p50: merged / unmerged 1\.0\d\d .*fails$", missed)
    assert list(serving.bounds(rows(0.05, metric="TPOT, p99"))) == []


def test_a_planted_slowdown_that_is_not_found_is_a_missed_bound():
    planted = row("plant", "merged", "SmolLM2-135M-Instruct", "", [0.05], unit="")
    assert list(serving.bounds([*rows(0.05), planted])) == []
    few = [dataclasses.replace(one, samples=one.samples[:3]) for one in rows(0.05)]
    few = [dataclasses.replace(one, shape=one.shape.replace("3 starts", "1 start")) for one in few]
    (missed,) = serving.bounds([*few, planted])
    assert "merged / unmerged 1.0" in missed
    (undecided,) = serving.bounds(few)
    assert undecided.endswith("is undecided")
    for slowdown in (0.0, -0.05):
        (missed,) = serving.bounds([*rows(slowdown), planted])
        assert missed.endswith("steps were really 5% longer, and this does not show it")


def test_plain_vllm_needs_no_round_in_every_pair():
    """Three starts of eight pairs, and a round of plain vLLM in the first, fourth and seventh."""
    ours, theirs = rows(0.05)
    ours = dataclasses.replace(ours, provider="unmerged")
    some = tuple(value for i, value in enumerate(theirs.samples) if i % 8 in (0, 3, 6))
    theirs = dataclasses.replace(theirs, provider=serving.PLAIN, samples=some)
    ((*_, ratio, outcome),) = serving.comparisons([ours, theirs])
    assert float(ratio.split()[0]) == pytest.approx(1.05, abs=0.02)
    assert outcome == ""


def test_no_more_pairs_are_asked_for_than_are_kept():
    with pytest.raises(ValueError, match="at most 100 are kept"):
        serving.Options(starts=6, pairs=20)
    with pytest.raises(ValueError, match="seconds=0"):
        serving.Options(starts=2, pairs=20)
    serving.Options(**serving.FULL)


def test_a_slowed_step_takes_longer_and_gives_the_same(tmp_path):
    def step(seconds):
        time.sleep(seconds)
        return "outcome"

    plant.slow_down(tmp_path, 0.0)
    slowed = plant.slower(step, tmp_path / "share")
    for share, least, most in ((0.0, 0.05, 1.0), (20.0, 1.05, 20), (0.0, 0.05, 1.0)):
        plant.slow_down(tmp_path, share)
        began = time.perf_counter()
        assert slowed(0.05) == "outcome"
        assert least <= time.perf_counter() - began < most


def test_a_plant_is_a_plugin_of_vllm(tmp_path):
    variables = plant.variables(tmp_path)
    asked = (
        "from importlib.metadata import entry_points as e; print(e(group='vllm.general_plugins'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked], env=variables, capture_output=True, text=True, check=True
    )
    assert f"name='{plant.NAME}', value='benchmarks.plant:register'" in done.stdout


@pytest.fixture
def changed(tmp_path):
    """A model and its merge: two matrices of ranks 2 and 8 changed, and a norm."""
    dice = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=dice)

    task = {"a.q_proj.weight": random(24, 16), "a.o_proj.weight": random(16, 8),
            "b.weight": random(16), "c.weight": random(8, 8)}  # fmt: skip
    merged = dict(task)
    merged["a.q_proj.weight"] = task["a.q_proj.weight"] + random(24, 2) @ random(2, 16)
    merged["a.o_proj.weight"] = task["a.o_proj.weight"] + random(16, 8)
    merged["b.weight"] = task["b.weight"] + 1
    for name, tensors in (("task", task), ("merged", merged)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


def test_an_adapter_is_the_nearest_of_its_rank(changed):
    task, merged = changed / "task", changed / "merged"
    shares = {}
    for rank in (2, 16):
        shares[rank] = adapters.write_nearest(task, merged, rank, changed / f"rank-{rank}")
    assert shares[16] == pytest.approx(1, abs=0.01)
    assert 0.3 < shares[2] < 0.99
    config = json.loads((changed / "rank-2" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    assert sorted(config["target_modules"]) == ["o_proj", "q_proj"]
    factors = load_file(changed / "rank-2" / "adapter_model.safetensors")
    assert len(factors) == 4
    at = "base_model.model.a.q_proj.lora_{}.weight"
    found = factors[at.format("B")].float() @ factors[at.format("A")].float()
    deltas = dict(adapters.merged_deltas(task, merged))
    assert torch.allclose(found, deltas["a.q_proj.weight"], atol=0.05)


@pytest.mark.slow  # and part of each run of the benchmark
@pytest.mark.parametrize("compiled", [False, True])
def test_a_merge_changes_values_and_nothing_else(tmp_path, compiled):
    """The first layer of the real small model, by real vLLM on both sides."""
    case = small_case(tmp_path / "case", 1)
    found = serving.demand_same_structure(case, tmp_path / "found", enforce_eager=not compiled)
    assert len(found["keys"]) == compiled
    assert (len(found["code"]) > 5) == compiled
    assert any("self_attn.qkv_proj" in module for module in found["modules"])
    assert any("strides (576, 1)" in tensor for tensor in found["loaded tensors"])


def test_what_differs_is_named():
    ours = {"tensors": ["a: (2, 2)", "b: (3,)"], "code": ["x", "y"], "digests": ["a: 1"]}
    theirs = {"tensors": ["a: (2, 1)", "b: (3,)"], "code": ["y", "x"], "digests": ["a: 2"]}
    assert differences(ours, ours) == {}
    assert differences(ours, theirs) == {
        "tensors": ["-a: (2, 1)", "+a: (2, 2)"],
        "code": ["the order"],
        "digests": ["-a: 2", "+a: 1"],
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_planted_slowdown_is_caught():
    """A real server, really slower while it is merged: by half, which any machine can see."""
    command = [sys.executable, "-m", "benchmarks", "run", "serving", "--no-write", "--json"]
    chosen = ("starts=1", "pairs=8", "clients=2", "offline=1", "graph=false", "plant=0.5")
    done = subprocess.run(
        [*command, *(word for one in chosen for word in ("-o", one))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [one for one in json.loads(done.stdout) if one["metric"] == "TPOT, p50"]
    times = {one["provider"]: one["p50"] for one in found}
    assert 1.3 < times["merged"] / times["unmerged"] < 1.6
    assert len(times) == 3
