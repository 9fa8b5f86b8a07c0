"""Timing side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def interleaved(
    providers: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds for each provider, ABAB: whatever else the machine does meets all of them.

    Args:
        providers: What each does.
        rounds: How often.
        warm_up: Do it once before, which warms caches and allocators.
    """
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    if warm_up:
        for run in providers.values():
            run()
    for _ in range(rounds):
        for name, run in providers.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds
