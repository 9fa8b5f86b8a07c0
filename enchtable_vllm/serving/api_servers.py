"""What several API servers need, to show one truth on ``/metrics``.

With more than one, each keeps its metrics in files of one folder, and a scrape adds them up. A
process cannot take back what another wrote: a label set that is no longer true has to be set
to 0 by whoever sets its successor, so it must be known what others have set; and what all of them
see, one must count.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from prometheus_client import Gauge, multiprocess


def folder() -> str | None:
    """Where they keep their metrics; None if there is but one. VLLM's own test."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR")


def shown(gauge: Gauge) -> Iterator[tuple[Mapping[str, str], float]]:
    """Labels and values of a ``mostrecent`` gauge, as a scrape shows them, whoever set them."""
    (own,) = gauge.describe()
    found: Iterable[Any] = gauge.collect()
    if (shared := folder()) is not None:
        # All such gauges of all processes, under the names that prometheus_client gives.
        collector: Any = multiprocess.MultiProcessCollector
        found = collector.merge(map(str, Path(shared).glob("gauge_mostrecent_*.db")))
    for metric in found:
        if metric.name == own.name:
            for sample in metric.samples:
                yield sample.labels, sample.value


def claim(event: Iterable[str]) -> bool:
    """Whether this process is to count an event that all of them see: the first that asks."""
    shared = folder()
    if shared is None:
        return True
    name = f"enchtable-{sha256(' '.join(event).encode()).hexdigest()[:32]}.counted"
    try:
        Path(shared, name).touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return False
    return True
