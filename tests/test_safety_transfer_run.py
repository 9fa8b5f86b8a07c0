"""A whole run of the benchmark over several seeds; training and vLLM are stood in for."""

import csv
import sys
from collections import Counter
from typing import ClassVar

import pytest
from test_safety_transfer import MODELS, packages, report

from benchmarks.harness.results import Results
from benchmarks.safety_transfer import __main__ as run
from benchmarks.safety_transfer import material, measuring, pages
from benchmarks.safety_transfer.recipes import ABLATIONS
from benchmarks.safety_transfer.training import Cast
from enchtable_vllm.evaluate.report import Rate
from enchtable_vllm.evaluate.tune_choice import Step
from enchtable_vllm.evaluate.tune_journal import Sweep, Tuning
from enchtable_vllm.fleet.documents import Served

__all__ = ["packages"]

SERVED = Served(
    safety_vector="@none", vector_digest=None, plan_digest=None, beta=None, weight_version="",
    epoch=0,
)  # fmt: skip


class Lazy:
    """A server that starts when it is asked for, and counts its swaps."""

    started: ClassVar = Counter()
    swaps: ClassVar = Counter()

    def __init__(self, _model, _arguments, log, _steps):
        self.name = log.stem

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def url(self):
        self.started[self.name] += 1
        return "http://server"

    def swap(self, vector, beta):
        self.swaps[vector, beta] += 1

    def retained_share(self):
        return 0.99

    def ask(self, questions, **_):
        return ["Answer"] * len(questions)


def step(beta, unsafe, utility, refused):
    unsafe, utility, refused = (Rate.make(count, 100) for count in (unsafe, utility, refused))
    return Step(
        beta=beta, folder="f", unsafe=unsafe, worst=unsafe, utility=utility, over_refusal=refused
    )


def enchtable(command, *words, log):
    """Writes what the real command would."""
    words = list(map(str, words))
    output = log.parent / words[words.index("-o") + 1]
    if command == "compare":
        log.write_text("compared\n")
        return
    output.mkdir(parents=True, exist_ok=True)
    if command == "tune":
        betas = [float(beta) for beta in words[words.index("--betas") + 1].split(",")]
        steps = [step(None, 90, 80, 0), *(step(b, round(90 - 85 * b), 80, 0) for b in betas)]
        tuning = Tuning(
            sweep=Sweep(url="http://server", safety_vector="v"), before=SERVED,
            weights=("t", None, None), steps=steps, proposed=max(betas),
        )  # fmt: skip
        (output / "tune.json").write_text(tuning.model_dump_json())
        (output / "index.html").write_text("")
        return
    made = report(90, 80, 0) if output.name == "task" else report(5, 79, 1)
    if output.name.startswith("public-"):
        results = tuple(
            one.model_copy(update={"name": "humaneval"})
            for one in made.results
            if one.kind == "utility"
        )
        made = made.model_copy(update={"results": results})
    (output / "report.json").write_text(made.to_json())


@pytest.fixture
def bench(packages, tmp_path, monkeypatch):
    """The command, with arguments of its own."""

    def train(_, folder, *__):
        return Cast(*(folder / name for name in ("a", "b", "t", "e", "v")), anchors=[])

    monkeypatch.setattr(run, "cache_folder", lambda: tmp_path)
    (tmp_path / "demo").symlink_to(packages)
    monkeypatch.setattr(run, "small_model", lambda folder: folder)
    monkeypatch.setattr(run, "Models", lambda: MODELS)
    monkeypatch.setattr(run, "train_models", train)
    monkeypatch.setattr(run, "distil_vector", lambda *_: None)
    monkeypatch.setattr(run, "Lazy", Lazy)
    monkeypatch.setattr(run, "enchtable", enchtable)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(material, "public_utilities", lambda _: ["gsm8k=file"])
    monkeypatch.setattr(measuring, "enchtable", enchtable)
    monkeypatch.setattr(measuring.Asking, "_attenuation", lambda *_: 0.8)
    (tmp_path / "results").mkdir()

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["bench", "--work", str(tmp_path / "work"), *words])
        Lazy.started.clear()
        Lazy.swaps.clear()
        run.main()
        with (tmp_path / "results" / "safety_transfer.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return command


def test_all_seeds_are_compared_and_the_first_is_ablated(bench, tmp_path, capsys):
    rows = bench("--seeds", "0,1")
    models = {seed: {r["model"] for r in rows if r["seed"] == seed} for seed in ("0", "1")}
    compared = {*run._COMPARED, "sweep-main"}
    ablations = {variant.name for variant in ABLATIONS}
    more = {"stochastic", "stochastic-published", "public-task", "public-merged"}
    assert models["1"] == compared - {"merged-tenth"}  # which is the tuned one, under its name
    assert models["0"] == models["1"] | ablations | more | {f"sweep-{a}" for a in ablations}
    assert {row["command"] for row in rows} == {"make bench-transfer SEEDS=0,1"}
    assert len({row["recipe"] for row in rows}) == 1
    assert Lazy.swaps["main", 1.0] == 4  # of each seed, for the public sets, rounded otherwise
    printed = capsys.readouterr().out
    assert printed.count("(met)") == 6
    for name, table in pages.TABLES.items():
        assert table(Results(tmp_path / "results")), name

    again = bench("--seeds", "0,1")
    assert again == rows
    assert not Lazy.swaps
    assert not Lazy.started
    assert f"0 rows appended to {tmp_path / 'results'}" in capsys.readouterr().out


def test_a_reduced_run_is_of_the_first_seed_alone(bench):
    rows = bench("--reduced")
    assert {row["seed"] for row in rows} == {"0"}
    assert {row["command"] for row in rows} == {"make bench-transfer REDUCED=1"}
    assert not {row["model"] for row in rows} & {variant.name for variant in ABLATIONS}
