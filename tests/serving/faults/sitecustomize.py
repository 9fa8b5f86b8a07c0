"""Makes a rank of a real server misbehave, or its engines, when a file says so.

On the path of a server that a test starts, and of nothing else. ``ENCHTABLE_TEST_FAULT`` names the
file: ``{"rank": 1, "command": "commit", "do": "break"}``; ``"engine"`` picks one of several.
Without the file nothing happens.

``break``: the reload that the command makes fails after two tensors, layers taken apart.
``lie``: the command answers with another digest, or identity.
``raise``: it fails before it does anything; ``throw``: so does an exception that nobody foresaw.
``sleep``: it takes ``seconds`` longer; of ``stage``, in its thread. ``exit``: the process is gone.
``hold``, of ``poll``: it answers that nothing is staged yet, until the file is gone.

``pause``, ``resume`` and ``is_paused`` are asked of the engines by an API server: ``raise``;
``hold``: it waits until the file is gone; ``sleep``: its answer comes ``seconds`` later.
``ENCHTABLE_TEST_LEASE``: how many seconds a swap may be silent.
"""

import asyncio
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from pathlib import Path

MODULE = "enchtable_vllm.serving.swap.rank"


LIE = {"digest": "blake3:0", "new_digest": "blake3:0", "identity": {"vector_digest": "blake3:0"}}


def planted(command):
    try:
        fault = json.loads(Path(os.environ["ENCHTABLE_TEST_FAULT"]).read_text())
    except (OSError, ValueError):
        return {}
    return fault if command in fault.get("command", "").split("|") else {}


def wanted(worker, command):
    fault = planted(command)
    engine = worker.vllm_config.parallel_config.data_parallel_index
    mine = fault.get("rank") in (None, worker.rank) and fault.get("engine") in (None, engine)
    return fault if mine else {}


def breaking(tensors):
    class Half(dict):
        def items(self):
            for number, pair in enumerate(super().items()):
                if number == 2:
                    raise RuntimeError("planted: the reload broke off")
                yield pair

    return Half(tensors)


def install(module):
    Rank, swap = module.Rank, module.compat_swap
    module.LEASE_SECONDS = float(os.environ.get("ENCHTABLE_TEST_LEASE", module.LEASE_SECONDS))
    answer, stage, reload = Rank.answer, Rank._stage, swap.reload
    breaks = []

    def faulty_answer(self, command, arguments):
        fault = wanted(self._worker, command)
        do = fault.get("do")
        if do == "exit":
            os._exit(1)
        if do == "raise":
            return module._no("commit_failed", "planted: it failed")
        if do == "sleep" and command != "stage":
            time.sleep(fault["seconds"])
        if do == "break":
            breaks.append(True)
        try:
            found = answer(self, command, arguments)
        finally:
            breaks.clear()
        if do == "hold":
            return {**found, "staged": False}
        return found | {k: LIE[k] for k in LIE if k in found} if do == "lie" else found

    def throwing(command, method):
        def faulty(self, *arguments, **options):
            if wanted(self._worker, command).get("do") == "throw":
                raise ZeroDivisionError("planted: nobody foresaw it")
            return method(self, *arguments, **options)

        return faulty

    for command in ("stage", "poll", "commit", "publish", "finish"):
        setattr(Rank, command, throwing(command, getattr(Rank, command)))

    def faulty_call(command, method):
        async def faulty(self, *arguments):
            fault = planted(command)
            if fault.get("do") == "raise":
                raise RuntimeError(f"planted: no {command}")
            while planted(command).get("do") == "hold":
                await asyncio.sleep(0.05)
            found = await method(self, *arguments)
            if fault.get("do") == "sleep":
                await asyncio.sleep(fault["seconds"])
            return found

        return faulty

    for command in ("pause", "resume", "is_paused"):
        setattr(swap.Engines, command, faulty_call(command, getattr(swap.Engines, command)))

    def faulty_reload(worker, tensors):
        return reload(worker, breaking(tensors) if breaks else tensors)

    def slow_stage(self, *arguments):
        fault = wanted(self._worker, "stage")
        if fault.get("do") == "sleep":
            time.sleep(fault["seconds"])
        stage(self, *arguments)

    Rank.answer, Rank._stage, swap.reload = faulty_answer, slow_stage, faulty_reload


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def then_install(module):
            execute(module)
            install(module)

        spec.loader.exec_module = then_install
        return spec


if os.environ.get("ENCHTABLE_TEST_FAULT"):
    sys.meta_path.insert(0, Finder())
