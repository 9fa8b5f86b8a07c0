"""Metrics of loading where ``VLLM_PLUGINS`` is not set, and so our routes do not exist.

vLLM makes a stat logger in every API server, of any model: this one acts once, when the engine
is up, and only for a model that was loaded with ``--load-format enchtable``. It must not stand
in the way of any other server, so nothing here raises.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any

from enchtable_vllm.serving import compat, records
from enchtable_vllm.serving.registration import LOAD_FORMAT

_log = compat.logger("metrics")


class LoadMetrics(compat.stat_logger_base()):  # type: ignore[misc]  # vllm is untyped here
    """Shows what was loaded; the entry point of ``vllm.stat_logger_plugins``."""

    def __init__(self, vllm_config: Any, *_: Any, **__: Any) -> None:
        self._config = vllm_config

    def log_engine_initialized(self) -> None:
        """Called once, when all weights are loaded."""
        try:
            if self._config.load_config.load_format == LOAD_FORMAT and not _left_to_the_plugin():
                _show()
        except Exception:
            _log.exception("the metrics of enchtable are not available")

    def record(self, *_: Any, **__: Any) -> None:
        """Called at every step; what is loaded does not change there."""

    def record_admission_rejection(self, *_: Any, **__: Any) -> None:
        """Of no interest here."""


# What a later vLLM adds to the interface must not keep a server from starting.
LoadMetrics.__abstractmethods__ = frozenset()


def _left_to_the_plugin() -> bool:
    """Whether the endpoint plugin is loaded too: it knows all that is known here, and swaps."""
    named = os.environ.get("VLLM_PLUGINS", "").split(",")
    return "enchtable" in named and bool(
        entry_points(group="vllm.endpoint_plugins", name="enchtable")
    )


def _show() -> None:
    left = records.read()
    if not left:
        _log.warning(
            "no rank's load report reached this API server, so /metrics has none of enchtable's: "
            "start with VLLM_PLUGINS=enchtable to have them from the ranks themselves"
        )
        return
    from enchtable_vllm.serving import metrics

    status = status_of(left)
    metrics.shared().serving(status)
    _log.info(
        "/metrics has what %d rank(s) loaded; with VLLM_PLUGINS=enchtable it has swaps too",
        len(left),
    )


def status_of(left: list[dict[str, Any]]) -> dict[str, Any]:
    """The status of a server that has loaded and cannot swap.

    Args:
        left: At least one record of `records`. Experts that one rank filters another has, so
            the counts are those of the rank that merged most.
    """
    active = max(left, key=lambda record: record["merged"])
    identity = ("vector_digest", "plan_digest", "beta", "scope", "rounding")
    return {
        "ready": True,
        "weight_version": active["weight_version"],
        "epoch": 0,
        "modules": active["modules"],
        "active": active,
        "as_desired": None,
        "disagreeing": sum(any(r[key] != active[key] for key in identity) for r in left),
    }
