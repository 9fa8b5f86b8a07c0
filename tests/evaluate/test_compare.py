"""Reports side by side: rates, pairs, the page, and the command."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from eval_runs import ROOT, command, environment

from enchtable_vllm.cli.compare import _names
from enchtable_vllm.evaluate.compare import compare
from enchtable_vllm.evaluate.compare_page import compare_page
from enchtable_vllm.evaluate.faults import ReportError
from enchtable_vllm.evaluate.report import (
    Dynamic,
    Judge,
    Probe,
    Rate,
    Report,
    Result,
    Sample,
    ServedNow,
    Settings,
)
from enchtable_vllm.evaluate.report_page import report_page

SETTINGS = Settings(
    max_tokens=256, utility_max_tokens=512, limit=None, seed=0, split="all", validation_share=0.5,
    system_prompt_baseline=None, utility_prompt="instructed",
)  # fmt: skip


def result(kind, verdicts, *, name="set", digest="blake3:d", refused=None, prefix="p"):
    samples = [
        Sample(id=f"{prefix}{n}", verdict=verdict, refused=verdict == "safe", category="c & d")
        for n, verdict in enumerate(verdicts)
    ]
    if refused is not None:
        samples = [
            s.model_copy(update={"refused": r}) for s, r in zip(samples, refused, strict=True)
        ]
    return Result.of(
        name, kind, source="list", digest=digest, available=len(samples), samples=samples
    )


def made(*results, model="m", **changes):
    return Report(
        model=model, served=None, judge=Judge(name="patterns"), settings=SETTINGS,
        results=results, versions={"python": "3"}, created="2026-01-01T00:00:00+00:00",
    ).model_copy(update=changes)  # fmt: skip


def test_counts():
    found = result("safety", ["unsafe", "safe", "unparseable", "failed", "safe"])
    assert (found.main.count, found.main.of) == (1, 3)
    assert (found.worst.count, found.worst.of) == (3, 5)
    assert (found.refused.count, found.refused.of) == (2, 4)
    assert (found.unparseable, found.failed) == (1, 1)
    solved = result("utility", ["correct", "wrong", "unparseable", "failed"])
    assert (solved.main.count, solved.main.of) == (1, 3)
    nothing = result("safety", ["failed"])
    assert nothing.main.share is None
    assert str(nothing.main) == "none"


def test_pairs_are_of_the_same_set_and_prompt_and_have_verdicts():
    first = made(result("safety", ["unsafe"] * 10 + ["safe"] * 5 + ["unparseable", "unsafe"]))
    second = made(result("safety", ["safe"] * 9 + ["unsafe"] + ["safe"] * 5 + ["safe", "failed"]))
    comparison = compare([("a", first), ("b", second)])
    difference = comparison.rows[1].differences["safety"]
    assert (difference.pairs, difference.unpaired) == (15, 2)
    assert (difference.only_first, difference.only_this) == (9, 0)
    assert difference.difference == pytest.approx(-9 / 15)
    assert difference.p == pytest.approx(2 / 2**9)
    assert difference.low <= difference.difference <= difference.high
    assert comparison.rows[0].differences == {}
    assert any("2 prompt(s) have no partner" in text for text in comparison.warnings)
    other = made(result("safety", ["unsafe"] * 3, digest="blake3:e"))
    (_, row) = compare([("a", first), ("b", other)]).rows
    assert row.differences["safety"].pairs == 0
    assert row.differences["safety"].difference is None


def test_every_kind_counts_its_own_event():
    first = made(
        result("utility", ["correct", "wrong", "unparseable"]),
        result("harmless", ["safe"] * 3, refused=[True, False, False]),
    )
    second = made(
        result("utility", ["correct", "correct", "correct"]),
        result("harmless", ["safe"] * 3, refused=[True, True, False]),
    )
    (_, row) = compare([("a", first), ("b", second)]).rows
    assert row.differences["utility"].only_this == 2
    assert row.differences["harmless"].only_this == 1


def test_what_a_rate_leaves_open_stands_beside_it():
    first = made(result("safety", ["unsafe"] * 4))
    second = made(
        result("safety", ["unsafe", "unparseable", "failed", "safe"]),
        result("utility", ["correct", "unparseable"]),
    )
    comparison = compare([("a", first), ("b", second)])
    assert comparison.rows[0].doubts == {}
    found = comparison.rows[1].doubts
    assert (found["safety"].unparseable, found["safety"].failed) == (1, 1)
    assert (found["safety"].worst.count, found["safety"].worst.of) == (3, 4)
    assert (found["utility"].unparseable, found["utility"].worst) == (1, None)
    page = compare_page(comparison)
    assert "1/2; 1 unparseable, 1 failed, 75.0% if all were unsafe" in page
    assert "1/2; 1 unparseable, 0 failed" in page


def test_what_is_unlike_is_said():
    first = made(result("safety", ["safe"]))
    second = made(
        result("safety", ["safe"], digest="blake3:other"),
        judge=Judge(name="md-judge", model="j"),
        settings=SETTINGS.model_copy(update={"max_tokens": 24}),
    )
    warnings = compare([("a", first), ("b", second)]).warnings
    for words in ("another judge", "another max_tokens", "other sets"):
        assert any(words in warning for warning in warnings)
    attacked = [
        Dynamic(
            version=version, complete=True, attempts=1, unjudged=0, broke=Rate.make(0, 1),
            probes=(Probe(probe="dra.DRA", detector="d", broke=Rate.make(0, 1)),),
        )
        for version in ("0.17.1", "0.18")
    ]  # fmt: skip
    one, other = (first.model_copy(update={"dynamic": dynamic}) for dynamic in attacked)
    assert compare([("a", one), ("b", one)]).warnings == ()
    assert compare([("a", one), ("b", other)]).warnings == (
        "b: other attacks, or another garak, than the first report's",
    )
    for labels in (["a"], ["a", "a"]):
        with pytest.raises(ReportError):
            compare([(label, first) for label in labels])


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_pages_are_whole_and_nothing_in_them_is_alive():
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    one = made(
        result("safety", ["unsafe", "safe"], name=hostile),
        model=hostile,
        served=ServedNow(
            safety_vector=hostile, beta=1.0, weight_version=hostile, task_model="blake3:t"
        ),
    )
    samples = tuple(
        sample.model_copy(update={"category": f"{hostile}{n}"})
        for n, sample in enumerate(one.results[0].samples)
    )
    one = one.model_copy(
        update={"results": (one.results[0].model_copy(update={"samples": samples}),)}
    )
    for text in (report_page(one), compare_page(compare([(hostile, one), ("b", one)]))):
        tags = Tags(text).found
        assert "default-src 'none'" in text
        assert {tag for tag, _ in tags} <= {
            "html", "head", "meta", "link", "title", "style", "body", "main", "h1", "h2", "p",
            "div", "table", "thead", "tbody", "tr", "th", "td", "br", "small",
        }  # fmt: skip
        names = {name for _, attributes in tags for name in attributes}
        assert names <= {
            "lang", "charset", "http-equiv", "content", "name", "rel", "href", "class", "scope"
        }  # fmt: skip
        assert [found["href"] for _, found in tags if "href" in found] == ["data:,"]
        assert "&lt;script&gt;" in text


def saved(tmp_path, name, report):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "report.json").write_text(report.to_json())
    return folder


def test_the_command(tmp_path):
    first = saved(tmp_path, "before", made(result("safety", ["unsafe"] * 12), model="task"))
    second = saved(tmp_path, "after", made(result("safety", ["safe"] * 12), model="[red]merged"))
    page = tmp_path / "page.html"
    out, _ = command("compare", first, second, "-o", page)
    for words in ("-100.0%", "p = 0.00049", "better, 12 pairs", "[red]merged", "100.0%"):
        assert words in out
    assert "p = 0.000488, 12 pairs; better" in page.read_text()
    out, _ = command("compare", first, second / "report.json", "--json")
    document = json.loads(out)
    assert document["rows"][1]["differences"]["safety"]["only_first"] == 12
    assert [row["label"] for row in document["rows"]] == [first.name, second.name]
    _, error = command("compare", first, tmp_path / "none", code=1)
    assert "enchtable eval" in error
    value = json.loads((second / "report.json").read_text()) | {"format_version": 2}
    (second / "report.json").write_text(json.dumps(value))
    _, error = command("compare", first, second, code=1)
    assert "format version 2" in error


def test_reports_are_named_by_what_tells_them_apart(tmp_path):
    def named(*paths):
        return _names([tmp_path / path for path in paths])

    assert named("x/a", "x/b") == ["a", "b"]
    assert named("x/report", "y/report") == ["x/report", "y/report"]
    assert named("a", "a") == [str(tmp_path / "a")] * 2  # which is refused


def test_comparing_needs_neither_torch_nor_the_framework():
    code = (
        "import sys; sys.modules['inspect_ai'] = sys.modules['torch'] = None\n"
        "sys.argv[1:] = ['compare', '--help']\n"
        "from enchtable_vllm.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "McNemar" in done.stdout
    code = code.replace("'compare', '--help'", "'eval', '--url', 'http://x:1', '-o', 'y'")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "enchtable-vllm[evaluation]" in done.stderr
