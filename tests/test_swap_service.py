"""What an API server makes of its engines' answers, when they are not as they should be.

The answers are planted; in a process of its own, because vLLM is imported.
"""

import json
import subprocess
import sys

import pytest
from vllm_runs import environment

PROGRAM = """
import asyncio, json, sys
from types import SimpleNamespace

from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.swap.errors import SwapError
from enchtable_vllm.serving.swap.service import SwapService

def rank(version, swapping):
    identity = {"vector_digest": version, "plan_digest": version, "beta": 0.5}
    return {
        "ok": True, "rank": 0, "epoch": 1, "weight_version": version, "identity": identity,
        "broken": None, "swapping": swapping, "staged_bytes": 0, "not_swappable": None,
        "task_model": {}, "active": {"safety_vector": version, "beta": 0.5}, "modules": {},
        "rolls_back_to": None, "swaps": [],
    }

class Engines:
    dead, named = False, None
    async def call(self, *_):
        return [[rank(version, swapping)] for version in versions]
    async def is_paused(self):
        return False
    async def set_version(self, version):
        self.named = version

versions, swapping = json.loads(sys.argv[1])
observer = SimpleNamespace(serving=lambda status: None)

async def start():
    engines = Engines()
    try:
        await SwapService(engines, LoaderConfig(), observer).start()
    except SwapError as error:
        return str(error)
    return engines.named

print("\\nRESULT", json.dumps(asyncio.run(start())))
"""


@pytest.mark.parametrize(
    ("versions", "swapping", "named"),
    [(["a", "a"], False, "a"), (["a", "b"], True, "a"), (["a", "b"], False, None)],
)
def test_engines_that_loaded_different_vectors_are_no_server(versions, swapping, named):
    """But for the moment in which a swap reaches one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([versions, swapping])],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.rpartition("RESULT")[2])
    if named is None:
        assert "expected the same vector on each, got ['a', 'b']" in told
    else:
        assert told == named
