"""A slowdown, planted in one server to see whether the measurement finds it.

A general plugin of vLLM: after each step of the engine it computes for a share of the time that
the step took, as long as a file says so. Nothing else is changed, so what a benchmark then says
must be that share.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "enchtable-benchmark-plant"
_SHARE = "ENCHTABLE_BENCHMARK_PLANT"
_ROOT = Path(__file__).parent.parent


def variables(folder: Path) -> dict[str, str]:
    """The environment of a server that can be slowed; name `NAME` among its plugins, too.

    Args:
        folder: The plugin is made known to vLLM there, as if it were installed.
    """
    metadata = folder / "enchtable_benchmark_plant-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{NAME} = benchmarks.plant:register\n"
    )
    slow_down(folder, 0.0)
    path = [str(folder), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), _SHARE: str(folder / "share")}


def slow_down(folder: Path, share: float) -> None:
    """From the next step on: 0.05 makes each take 5% longer."""
    written = folder / "share.new"
    written.write_text(str(share))
    written.replace(folder / "share")


def register() -> None:
    """What vLLM calls in each of its processes."""
    from vllm.v1.engine.core import EngineCore

    share = Path(os.environ[_SHARE])
    for name in ("step", "step_with_batch_queue"):
        setattr(EngineCore, name, slower(getattr(EngineCore, name), share))


def slower(step: Callable[..., Any], share: Path) -> Callable[..., Any]:
    """The same, and then it computes for that share, read from a file, of the time that it took."""

    @functools.wraps(step)
    def slowed(*arguments: Any) -> Any:
        began = time.perf_counter()
        outcome = step(*arguments)
        now = time.perf_counter()
        until = now + float(share.read_text()) * (now - began)
        while time.perf_counter() < until:
            pass
        return outcome

    return slowed
