"""`enchtable report --plan-report`: how long each tensor took, which no plan says."""

import json
import time

import pytest
from plans import dense, make_plan
from reports import Page, facts, report
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.errors import MergePlanError, MismatchError
from enchtable_vllm.plan import read_plan
from enchtable_vllm.plan.journal import Journal, Terms
from enchtable_vllm.report.printed import Planned

TERMS = Terms(1.0, (0.5,), (0.5,), (("gram32", "gram32"),))


@pytest.fixture
def planned(family, tmp_path):
    """A plan, and the file in which its command's output is kept."""
    path, kept = tmp_path / "plan.json", tmp_path / "printed.json"
    names = ("--task-model", family.task, "--base-model", family.base)
    options = ("--safety-vector", family.vector, "-o", path, "--json")
    done = CliRunner().invoke(cli.app, ["plan", *map(str, (*names, *options))])
    assert done.exit_code == 0, done.output
    kept.write_text(done.stdout)
    return path, kept


def test_planning_says_how_long_each_tensor_took_and_the_page_shows_it(planned, tmp_path):
    path, kept = planned
    plan, digest = read_plan(path)
    printed = json.loads(kept.read_text())
    seconds = printed["seconds"]
    assert printed["plan_digest"] == digest
    assert seconds.keys() == plan.merged.keys()
    assert min(seconds.values()) > 0
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    assert "seconds" not in path.read_text()
    page = tmp_path / "report.html"
    out, _ = report("--plan", path, "--plan-report", kept, "-o", page, "--json")
    assert json.loads(out)["seconds"] == seconds
    (caption, (_, *rows)), *_ = Page(page.read_text()).tables["effort"]
    assert caption.startswith("8 of 8 tensors, the slowest first")
    assert [name for name, *_ in rows] == list(seconds)
    total = sum(seconds.values())
    for name, took, share in rows:
        assert float(took) == pytest.approx(seconds[name], rel=0.01, abs=5e-4)
        assert float(share[:-1]) == pytest.approx(100 * seconds[name] / total, abs=0.06)


def test_an_interrupted_plans_times_are_those_of_the_run_that_did_the_work(tmp_path):
    digests = ("t", "b", "d")

    def work():
        time.sleep(0.05)
        return TERMS

    def interrupted(journal):
        with journal:
            journal.begin(["inputs"], matrices=2)
            journal.remember("first", digests, work)
            raise KeyboardInterrupt

    stopped = Journal(tmp_path / "journal")
    with pytest.raises(KeyboardInterrupt):
        interrupted(stopped)
    before = stopped.seconds
    assert before.keys() == {"first"}
    assert before["first"] >= 0.05
    with Journal(tmp_path / "journal") as journal:
        journal.begin(["inputs"], matrices=2)
        assert journal.remember("first", digests, pytest.fail) == TERMS
        journal.remember("second", digests, lambda: TERMS)
        assert journal.seconds["first"] == before["first"]
        assert journal.seconds["second"] < 0.05
        assert journal.remember("first", ("t", "b", "other"), lambda: TERMS) == TERMS
        assert journal.seconds["first"] < 0.05


def test_the_times_of_another_plan_are_refused(planned):
    _, kept = planned
    with pytest.raises(MismatchError, match="plan report: expected what was printed when this"):
        facts(make_plan(dense(2)), planned=Planned.read(kept))


@pytest.mark.parametrize(
    "damage",
    [{"seconds": {"q": -1.0}}, {"seconds": {"q": 1e999}}, {"seconds": [1.0]}, {"plan_digest": 1}],
    ids=str,
)
def test_damaged_times_are_refused(damage, tmp_path):
    path = tmp_path / "printed.json"
    path.write_text(json.dumps({"plan_digest": "blake3:aa", "seconds": {"q": 1.0}} | damage))
    with pytest.raises(MergePlanError, match="what 'enchtable plan --json' prints"):
        Planned.read(path)
