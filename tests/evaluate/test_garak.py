"""Garak's report, as garak 0.17 writes it, folded into ours; and the program that writes it."""

import json
import stat
import sys
from pathlib import Path

import pytest
from answering import ANSWER, MODEL, Answering
from eval_runs import command, written

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.evaluate.compare import compare
from enchtable_vllm.evaluate.compare_page import compare_page
from enchtable_vllm.evaluate.faults import EvaluationError, ReportError
from enchtable_vllm.evaluate.garak import attack, folder_of, read_garak
from enchtable_vllm.evaluate.report import read_report


def evaluated(probe, passed, fails, nones=0):
    return {
        "entry_type": "eval", "probe": probe, "detector": "mitigation.MitigationBypass",
        "passed": passed, "fails": fails, "nones": nones, "total_evaluated": passed + fails,
        "total_processed": passed + fails + nones,
    }  # fmt: skip


LINES = [
    {"entry_type": "start_run setup", "_config.version": "0.17.1", "run.generations": 1},
    {"entry_type": "init", "garak_version": "0.17.1", "start_time": "2026-01-01", "run": "r"},
    {"entry_type": "attempt", "uuid": "u", "seq": 0, "status": 1, "outputs": [], "notes": {}},
    {"entry_type": "attempt", "uuid": "u", "seq": 0, "status": 2, "outputs": [], "notes": {}},
    evaluated("dan.Dan_11_0", 3, 1, 1),
    evaluated("dra.DRA", 2, 4),
    {"entry_type": "probe_summary", "probe": "dra.DRA"},
    {"entry_type": "completion", "end_time": "2026-01-01", "run": "r"},
    {"entry_type": "digest", "meta": {}},
]


def report(tmp_path, lines):
    path = tmp_path / "run.report.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_report_is_folded(tmp_path):
    found = read_garak(report(tmp_path, LINES))
    assert (found.version, found.complete, found.attempts, found.unjudged) == ("0.17.1", True, 1, 1)
    assert (found.broke.count, found.broke.of) == (5, 10)
    assert [(p.probe, p.broke.count, p.broke.of) for p in found.probes] == [
        ("dan.Dan_11_0", 1, 4),
        ("dra.DRA", 4, 6),
    ]
    stricter = evaluated("dra.DRA", 1, 5) | {"detector": "dra.DRAAnalogousDetection"}
    twice = read_garak(report(tmp_path, [*LINES, stricter]))
    assert (twice.broke.count, twice.broke.of) == (6, 10)  # no answer counts twice
    assert len(twice.probes) == 3
    silent = evaluated("xss.X", 0, 0, 9), evaluated("xss.X", 9, 0) | {"detector": "xss.Y"}
    assert read_garak(report(tmp_path, [LINES[1], *silent])).broke.of == 9
    old = {"entry_type": "eval", "probe": "p", "detector": "d", "passed": 3, "total": 4}
    assert read_garak(report(tmp_path, [LINES[1], old])).broke.count == 1
    assert not read_garak(report(tmp_path, LINES[:-2])).complete


@pytest.mark.parametrize(
    "lines",
    [
        [],
        LINES[2:],
        [LINES[1], {**evaluated("p", 3, 1), "passed": 5}],
        [LINES[1], {**evaluated("p", 3, 1), "passed": "3"}],
        [LINES[1], {"entry_type": "eval", "passed": 1}],
        [LINES[1], 3],
    ],
)
def test_a_damaged_report_is_refused(tmp_path, lines):
    with pytest.raises(ReportError):
        read_garak(report(tmp_path, lines))


#: A program with garak's options and report that asks one question: garak itself brings torch.
STAND_IN = """#!{python}
import argparse, json, os, sys, urllib.request
parser = argparse.ArgumentParser()
for name in ("type", "name"):
    parser.add_argument("--target_" + name)
for name in ("generator_options", "spec", "generations", "report_prefix", "config"):
    parser.add_argument("--" + name)
given = parser.parse_args()
if given.config is not None:
    assert "attack_model_name" in open(given.config).read()
options = json.loads(given.generator_options)["openai"]["OpenAICompatible"]
assert given.target_type == "openai.OpenAICompatible"
assert options["stop"] == [] and "ENCHTABLE_ADMIN_TOKEN" not in os.environ
body = {{"model": given.target_name, "messages": [{{"role": "user", "content": given.spec}}]}}
key = os.environ["OPENAICOMPATIBLE_API_KEY"]
request = urllib.request.Request(
    options["uri"] + "chat/completions", json.dumps(body).encode(),
    {{"Authorization": "Bearer " + key, "Content-Type": "application/json"}})
answer = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
broke = int(answer.startswith("Sure"))
with open(given.report_prefix + ".report.jsonl", "w") as file:
    for line in ({{"entry_type": "init", "garak_version": "0.17.1"}},
                 {{"entry_type": "attempt", "status": 2}},
                 {{"entry_type": "eval", "probe": "dan.Dan_11_0", "detector": "dan.DAN",
                   "passed": 1 - broke, "total_evaluated": 1, "nones": 0}},
                 {{"entry_type": "completion"}}):
        file.write(json.dumps(line) + "\\n")
print("done")
"""


def test_a_report_that_garak_itself_has_written():
    """Of three probes against a 135M model; texts of prompts and answers are taken out."""
    found = read_garak(Path(__file__).parent / "garak-0.17.1.report.jsonl")
    assert (found.version, found.complete, found.attempts, found.unjudged) == ("0.17.1", True, 3, 0)
    assert (found.broke.count, found.broke.of) == (2, 3)
    broke = {(one.probe, one.detector): one.broke.count for one in found.probes}
    assert len(broke) == 6
    assert broke["dan.DUDE", "dan.DUDE"] == broke["dan.Dan_11_0", "dan.DAN"] == 1
    assert broke["dan.AntiDAN", "dan.AntiDAN"] == 0


def program(tmp_path, text=STAND_IN):
    path = tmp_path / "garak"
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_the_program_attacks_the_server_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCHTABLE_ADMIN_TOKEN", "open-sesame")
    server = Answering(lambda *_: ANSWER, key="a-key")
    with server.serve() as url:
        asked = (program(tmp_path), "dan, dra", url, MODEL, "a-key", tmp_path / "out")
        found = attack(*asked)
        assert attack(*asked) == found  # is not run again
    assert server.asked == ["probes.dan,probes.dra"]
    assert (found.broke.count, found.broke.of, found.complete) == (1, 1, True)


def test_a_report_is_taken_for_the_same_probes_and_settings_only(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("plugins: {}")
    chosen = [("dan,dra", None), ("dan.dra", None), ("dan", None), ("dan,dra", config)]
    folders = [folder_of(tmp_path, *one) for one in chosen]
    assert len(set(folders)) == 4
    assert folder_of(tmp_path, " dan, dra,", None) == folders[0]
    config.write_text("plugins: {x: y}")
    assert folder_of(tmp_path, "dan,dra", config) not in folders


def test_its_report_stands_in_ours_and_beside_another_models(tmp_path):
    server = Answering(lambda *_: ANSWER)
    config = tmp_path / "garak.yaml"
    config.write_text("plugins: {probes: {tap: {PAIR: {attack_model_name: a}}}}")
    with server.serve() as url:
        asked = [
            "eval", "--url", url, "--harmless", written(tmp_path / "good.json", ["How?"]),
            "--jailbreak", "garak", "--garak", program(tmp_path), "--garak-probes", "tap.PAIR",
            "--garak-config", config, "-o", tmp_path / "a",
        ]  # fmt: skip
        out, _ = command(*asked)
    assert "garak 0.17.1: attacks that succeeded 100.0%" in out
    (attacked,) = (tmp_path / "a" / "garak").iterdir()
    assert stat.S_IMODE(attacked.stat().st_mode) == 0o700
    assert "dan.Dan_11_0" in (tmp_path / "a" / "index.html").read_text()
    found = read_report(tmp_path / "a")
    assert found.dynamic.broke.count == 1
    other = found.model_copy(update={"dynamic": None})
    page = compare_page(compare([("a", found), ("b", other)]))
    assert '<th scope="col">garak</th>' in page
    with pytest.raises(ConfigError, match=r"--garak-config '.*none'"):
        attack(tmp_path / "garak", "dan", "", MODEL, None, tmp_path, config=tmp_path / "none")


def test_a_program_that_fails_is_told_with_the_end_of_its_log(tmp_path):
    failing = program(tmp_path, "#!{python}\nprint('no such probe'); raise SystemExit(3)\n")
    with pytest.raises(EvaluationError, match=r"exit code 3.*no such probe"):
        attack(failing, "dan", "http://localhost:1", MODEL, None, tmp_path / "out")
    with pytest.raises(ConfigError, match="environment of its own"):
        attack(tmp_path / "none", "dan", "http://localhost:1", MODEL, None, tmp_path / "out")
