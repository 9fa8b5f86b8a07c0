"""Real vLLM in processes of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from enchtable_vllm.checkpoint import Location
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.vector import SafetyVector

PROBE = Path(__file__).parent / "serving" / "probe.py"
#: A single rank computes in its engine's own process, as it does on a GPU. vLLM's CPU build would
#: start one more for it, which takes a third of the time until a server is up. And of `probe` the
#: engine, too, is in the process that asks: every setting after one start.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_NOT_INHERITED = ("TRITON_INTERPRET", "VLLM_PLUGINS")


def environment(**more):
    """For vLLM on a small machine, without the network and without Triton's interpreter."""
    inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    own = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "DO_NOT_TRACK": "1"}
    return inherited | own | more


def probe(settings, program=PROBE, **variables):
    """What real vLLM serves under each setting, and everything it printed."""
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(**variables),
    )
    printed = done.stdout + done.stderr
    found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    assert found, printed[-6000:]
    return json.loads(found[1]), printed


def changed(one, other):
    """Names of weights that differ on some rank."""
    return {
        name
        for mine, theirs in zip(one["weights"], other["weights"], strict=True)
        for name in mine
        if mine[name] != theirs[name]
    }


def merged_offline(family, folder):
    """`enchtable merge`'s checkpoint, to serve with plain vLLM."""
    vector, resolved = SafetyVector.open(family.vector), resolve_plan(*read_plan(family.plan))
    merge_checkpoint(Location(family.task), vector, resolved, folder)
    return folder
