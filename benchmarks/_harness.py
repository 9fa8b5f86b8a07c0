"""What the benchmarks share: interleaved timing, provenance, rows."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FIELDS = ("op", "provider", "shape", "dtype", "metric", "unit", "p20", "p50", "p80", "n")
PROVENANCE = ("device", "versions", "git_sha", "utc")


def interleaved(
    providers: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds for each provider, ABAB: whatever else the machine does meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for run in providers.values():
        run()  # warm caches and allocators
    for _ in range(rounds):
        for name, run in providers.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def row(
    op: str,
    provider: str,
    shape: object,
    dtype: str,
    values: list[float],
    *,
    metric: str = "time",
    unit: str = "s",
) -> dict[str, object]:
    """A row of results: what was measured, and its quantiles."""
    p20, p50, p80 = quantiles(values)
    what = (op, provider, shape, dtype, metric, unit, p20, p50, p80, len(values))
    return dict(zip(FIELDS, what, strict=True))


def write(
    name: str,
    rows: list[dict[str, object]],
    device: str,
    fields: tuple[str, ...] = FIELDS,
) -> Path:
    """Append rows with their provenance to ``results/{name}.csv``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    sha = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = " ".join(f"{p}={version(p)}" for p in ("torch", "triton", "vllm"))
    provenance = {
        "device": device,
        "versions": f"python={platform.python_version()} {versions}",
        "git_sha": sha,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields + PROVENANCE)
        if new:
            writer.writeheader()
        writer.writerows({**row, **provenance} for row in rows)
    return path
