"""Tables of error codes, error classes, metrics and environment variables."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from markup import code, of_docstring, table
from prometheus_client import CollectorRegistry

from enchtable_vllm import envs, errors
from enchtable_vllm.evaluate import faults
from enchtable_vllm.fleet import client, exchange
from enchtable_vllm.serving.metrics import ServerMetrics
from enchtable_vllm.serving.swap.errors import CODES


def swap_errors() -> str:
    """HTTP status, code, meaning."""
    rows = [[str(known.status), code(name), known.meaning] for name, known in CODES.items()]
    return table(["status", "code", "meaning"], rows)


def error_classes() -> str:
    """Each class of the tree, as its docstring says."""
    rows = [
        [code(name), of_docstring((kind.__doc__ or "").partition("\n\n")[0])]
        for module in (errors, faults, client, exchange)
        for name, kind in vars(module).items()
        if inspect.isclass(kind)
        and issubclass(kind, errors.EnchTableError)
        and kind.__module__ == module.__name__
    ]
    return table(["error", "means"], rows)


def metrics() -> str:
    """Name, type, labels and the very help that a scrape shows."""
    registry = CollectorRegistry()
    ServerMetrics(registry)
    rows = []
    collectors: Iterable[Any] = registry._collector_to_names
    for collector in collectors:
        (metric,) = collector.describe()
        labels = " ".join(map(code, collector._labelnames))
        name = metric.name + "_total" * (metric.type == "counter")
        rows.append([code(name), metric.type, labels, metric.documentation])
    return table(["metric", "type", "labels", "meaning"], rows)


def environment() -> str:
    """What `enchtable_vllm.envs` reads."""
    meanings = {}
    for _, function in inspect.getmembers(envs, inspect.isfunction):
        found = re.match(r"``(\w+(?:=\S+)?)``: (.*)", function.__doc__ or "", re.DOTALL)
        if found:
            meanings[found[1]] = of_docstring(found[2])
    return table(["variable", "meaning"], [[code(n), meanings[n]] for n in sorted(meanings)])
