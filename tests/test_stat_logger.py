"""The stat logger that vLLM makes in every API server: it acts for ours, and harms no other.

Run beside vLLM's real interface, in a process of its own.
"""

import json
import subprocess
import sys

import pytest
from vllm_runs import environment

PROGRAM = """
import json, logging, sys
from abc import abstractmethod
from types import SimpleNamespace

from prometheus_client import REGISTRY
from vllm.v1.metrics import loggers

class Later(loggers.AggregateStatLoggerBase):
    @abstractmethod
    def something_that_a_later_vllm_asks_for(self): ...

loggers.AggregateStatLoggerBase = Later
from enchtable_vllm.serving import metrics, stat_logger

class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

logging.getLogger("vllm.enchtable").addHandler(Said())
logging.getLogger("vllm.enchtable").setLevel(logging.INFO)
assert issubclass(stat_logger.LoadMetrics, loggers.StatLoggerBase)
results = []
for left, load_format, plugin in json.loads(sys.argv[1]):
    for collector in list(REGISTRY._collector_to_names):
        REGISTRY.unregister(collector)
    metrics.shared.cache_clear()
    said = []
    stat_logger.records.read = lambda: left
    stat_logger._left_to_the_plugin = lambda: plugin
    config = SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))
    logger = stat_logger.LoadMetrics(vllm_config=config, engine_indexes=[0])
    logger.record(None, None, mm_cache_stats=None, engine_idx=0)
    logger.log()
    logger.record_sleep_state(0, 0)
    logger.log_engine_initialized()
    values = [
        REGISTRY.get_sample_value(f"enchtable_{name}")
        for name in ("ready", "ranks_disagreeing", "beta")
    ]
    results.append([values, said])
print("RESULT", json.dumps(results))
"""
RANK = {
    "safety_vector": "sv-a", "vector_digest": "blake3:" + "a" * 64, "beta": 0.5, "scope": "all",
    "plan_digest": "blake3:" + "b" * 64, "rounding": "nearest", "weight_version": "sv-a:0d1e",
    "merged": 3, "modules": {},
}  # fmt: skip
NOTHING = [None, None, None]
#: (records, load format, whether the plugin is there, ready/disagreeing/beta, what is said).
CASES = {
    "loaded": ([RANK, RANK], "enchtable", False, [1, 0, 0.5], "what 2 rank(s) loaded"),
    "ranks disagree": (
        [RANK, RANK | {"beta": 0.4, "merged": 2}],
        *("enchtable", False, [1, 1, 0.5], "what 2 rank(s) loaded"),
    ),
    "no record": ([], "enchtable", False, NOTHING, "start with VLLM_PLUGINS=enchtable"),
    "a damaged record": ([{"merged": 1}], "enchtable", False, NOTHING, "are not available"),
    "another model": ([RANK], "auto", False, NOTHING, None),
    "plugin": ([RANK], "enchtable", True, NOTHING, None),
}


@pytest.fixture(scope="module")
def results():
    cases = json.dumps([case[:3] for case in CASES.values()])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, cases],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULT")]
    return dict(zip(CASES, json.loads(line.removeprefix("RESULT")), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_it_shows_what_was_loaded_and_says_so_once(results, case):
    (*_, shown, expected), (values, said) = CASES[case], results[case]
    assert values == shown
    if expected is None:
        assert said == []
    else:
        assert len(said) == 1
        assert expected in said[0]
