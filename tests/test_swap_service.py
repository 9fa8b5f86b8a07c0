"""What an API server makes of its engines' answers, when they are not as they should be, or late.

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


HANGS = """
import asyncio, json, threading, time
from enchtable_vllm.serving.swap import root
from enchtable_vllm.serving.swap.errors import SwapError

looks, hangs = [], threading.Event()

class Hanging:
    def __init__(self, path):
        looks.append(path)
        hangs.wait()

    def current(self):
        return None

async def ask():
    desired, found = root.Desired("/some"), {}
    started = time.monotonic()
    found["seen"] = [await desired.seen() for _ in range(4)]
    found["seconds"] = time.monotonic() - started
    found["looks"] = len(looks)
    try:
        await root.ask_root(hangs.wait)
    except SwapError as error:
        found["refused"] = str(error)
    hangs.set()
    found["afterwards"] = [await desired.seen() for _ in range(3)]
    found["looks afterwards"] = len(looks)
    return found

root.VectorRoot, root._ASK_SECONDS = Hanging, 0.2
print("\\nRESULT", json.dumps(asyncio.run(ask())))
"""


def test_a_root_that_hangs_keeps_nobody_waiting():
    """Probes of a second find a server ready; one look is outstanding, however many ask."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, check=False,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("RESULT")[2])
    assert found["seen"] == [None] * 4
    assert found["seconds"] / 4 < 0.9
    assert (found["looks"], found["looks afterwards"]) == (1, 3)
    assert "vector root: expected an answer in 0.2 s, got none" in found["refused"]
