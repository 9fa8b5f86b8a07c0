"""Garak's report, as garak 0.17 writes it, folded into ours; and the program that writes it."""

import json
import sys

import pytest
from answering import ANSWER, MODEL, Answering

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.evaluate.faults import EvaluationError, ReportError
from enchtable_vllm.evaluate.garak import attack, read_garak


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
for name in ("generator_options", "spec", "generations", "report_prefix"):
    parser.add_argument("--" + name)
given = parser.parse_args()
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


def test_a_program_that_fails_is_told_with_the_end_of_its_log(tmp_path):
    failing = program(tmp_path, "#!{python}\nprint('no such probe'); raise SystemExit(3)\n")
    with pytest.raises(EvaluationError, match=r"exit code 3.*no such probe"):
        attack(failing, "dan", "http://localhost:1", MODEL, None, tmp_path / "out")
    with pytest.raises(ConfigError, match="environment of its own"):
        attack(tmp_path / "none", "dan", "http://localhost:1", MODEL, None, tmp_path / "out")
