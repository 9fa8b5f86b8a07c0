"""What Prometheus sees: metrics under ``enchtable_``, in the processes that answer ``/metrics``.

Ordinary `prometheus_client` metrics, so that they are right with one API server, where the
process's own registry is scraped, and with several, where each process writes files that are
added up: gauges take the value that was set last, counters and histograms are sums. What that
asks for is in `api_servers`. Described in docs/metrics.md.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from enchtable_vllm import errors
from enchtable_vllm.checkpoint import short
from enchtable_vllm.errors import EnchTableError, printable
from enchtable_vllm.serving import api_servers
from enchtable_vllm.serving.swap.errors import CODES

# What `compat.logger` gives, without importing vLLM: metrics need prometheus_client only.
_log = logging.getLogger("vllm.enchtable.metrics")

#: Why a request was refused.
REASONS = tuple(CODES)
#: How a swap ends, and where it usually does. Other pairs appear when they happen.
OUTCOMES = {
    "swapped": "done",
    "rolled_back": "done",
    "unchanged": "done",
    "dry_run": "stage",
    "refused": "stage",
    "undone": "commit",
    "failed": "commit",
}
PHASES = ("stage", "pause", "commit", "publish", "done")
#: What a verification may fail with: the error's class.
KINDS = tuple(
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, EnchTableError) and kind is not EnchTableError
)
OTHER = "other"
#: More kinds of module than any known architecture has.
_MOST_MODULES = 32

_PAUSED = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SWAP = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STAGING = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_ATTENUATION = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_INTERFERENCE = (0.001, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

_LABELS = ("name", "digest", "plan", "version")

P = ParamSpec("P")


def _harmless(
    method: Callable[Concatenate[ServerMetrics, P], None],
) -> Callable[Concatenate[ServerMetrics, P], None]:
    """A metric that cannot be set is a line in the log: no request and no server fails for it."""

    @functools.wraps(method)
    def wrapper(self: ServerMetrics, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:
            _log.exception("the metrics of enchtable could not be set")

    return wrapper


class ServerMetrics:
    """All of this project's metrics; use `shared`, of which there is one in a process.

    Args:
        registry: Where they are registered; with several API servers vLLM reads their files.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        gauge = functools.partial(Gauge, registry=registry, multiprocess_mode="mostrecent")
        counter = functools.partial(Counter, registry=registry)
        histogram = functools.partial(Histogram, registry=registry)

        self._active = gauge(
            "enchtable_active_vector_info",
            "1 for what is served. Digests are their first twelve digits; empty without a vector, "
            "whose name is then @none.",
            _LABELS,
        )
        self._ready = gauge("enchtable_ready", "1: every rank serves what it should.")
        self._unmerged = gauge("enchtable_unmerged", "1: no safety vector is served.")
        self._signed = gauge(
            "enchtable_signed",
            "1: what is served is signed, as require_signature demands; 0: nobody asked.",
        )
        self._differs = gauge(
            "enchtable_desired_differs",
            "1: the vector root's current.json asks for something else.",
        )
        self._disagreeing = gauge(
            "enchtable_ranks_disagreeing",
            "Ranks that serve something else than the others; 0 is right.",
        )
        self._epoch = gauge("enchtable_epoch", "How often what is served was exchanged.")
        self._tensors = gauge(
            "enchtable_tensors",
            "Tensors, by fate: merged, kept, filtered (other ranks' experts), refused (of base "
            "model or vector, not in the task model).",
            ["fate"],
        )
        #: Key of status["active"] → the gauge that repeats it.
        self._numbers = {
            "retained_share": gauge(
                "enchtable_retained_share_ratio",
                "How much of the intended change arrived in the stored weights.",
            ),
            "beta": gauge("enchtable_beta", "The beta in force."),
            "norm_scale": gauge("enchtable_norm_scale", "The norm scale in force."),
            "attenuation_median": gauge(
                "enchtable_attenuation_median_ratio",
                "Attenuation of the vector in force: the median over its matrices.",
            ),
            "seconds": gauge("enchtable_merge_seconds", "How long the merge in force took."),
            "merged_bytes": gauge("enchtable_merged_bytes", "Bytes of the merged tensors."),
            "plan_seconds": gauge(
                "enchtable_plan_seconds",
                "How long computing the plan took, or finding it in the cache.",
            ),
        }
        self._plans = counter(
            "enchtable_plan_cache",
            "Plans made from a base model: hit if they were in the cache, miss.",
            ["result"],
        )
        self._attenuation = histogram(
            "enchtable_attenuation_ratio",
            "Attenuation of each matrix of each merge since the start, by kind of module.",
            ["module"],
            buckets=_ATTENUATION,
        )
        self._interference = histogram(
            "enchtable_interference",
            "Interference of each matrix of each merge since the start, by kind of module.",
            ["module"],
            buckets=_INTERFERENCE,
        )
        self._swaps = counter(
            "enchtable_swaps", "Swaps asked for, by how they ended and where.", ["outcome", "phase"]
        )
        #: Key of a swap's record → the histogram that it goes to.
        self._durations = {
            "swap_seconds": histogram(
                "enchtable_swap_seconds", "A swap, from the request to its end.", buckets=_SWAP
            ),
            "pausing_seconds": histogram(
                "enchtable_swap_pausing_seconds",
                "How long generation took to stop: a step, or with pause 'wait' all requests.",
                buckets=_SWAP,
            ),
            "paused_seconds": histogram(
                "enchtable_swap_paused_seconds",
                "How long generation then stood still.",
                buckets=_PAUSED,
            ),
            "staging_seconds": histogram(
                "enchtable_swap_staging_seconds",
                "How long a swap merged beside generation.",
                buckets=_STAGING,
            ),
        }
        self._staged = gauge(
            "enchtable_staged_bytes", "Host memory that the last swap held, over all ranks."
        )
        self._refused = counter(
            "enchtable_refused_requests", "Requests that were refused, by error code.", ["reason"]
        )
        self._failures = counter(
            "enchtable_verification_failures",
            "Vectors, plans or weights that were not what they should be, by error class.",
            ["kind"],
        )
        self._counted: tuple[str, ...] | None = None
        self._modules: set[str] = set()
        self._begin_at_zero()

    @_harmless
    def serving(self, status: Mapping[str, Any]) -> None:
        """Show what is served. Cheap enough for every probe; call it at start and after a swap.

        Args:
            status: As ``GET /v1/enchtable/status`` answers, and with ``modules``: kind →
                ``attenuation`` and ``interference``, a number for each matrix. ``active`` may
                also hold ``plan_seconds`` and ``plan_cache``.
        """
        epoch = int(status.get("epoch") or 0)
        active = status["active"]
        merged = active["vector_digest"] is not None
        self._show_active(status, active)
        self._epoch.set(epoch)
        self._ready.set(bool(status["ready"]))
        self._unmerged.set(not merged)
        self._signed.set(active.get("signed_by") is not None)
        self._differs.set(status.get("as_desired") is False)
        self._disagreeing.set(status.get("disagreeing") or 0)
        for fate in ("merged", "kept", "filtered", "refused"):
            self._tensors.labels(fate).set(_number(active.get(fate)))
        for key, gauge in self._numbers.items():
            gauge.set(_number(active.get(key)))
        if merged:
            self._count_merge(epoch, status)

    @_harmless
    def silent(self) -> None:
        """Show that the ranks do not answer: nobody can say what they serve."""
        self._ready.set(0)

    @_harmless
    def swapped(self, record: Mapping[str, Any]) -> None:
        """Count a swap that this process was asked for, whatever became of it.

        Args:
            record: An element of status["swaps"]; may also hold ``staged_bytes``.
        """
        outcome, phase = record["outcome"], record["phase"]
        self._swaps.labels(_among(OUTCOMES, outcome), _among(PHASES, phase)).inc()
        for key, histogram in self._durations.items():
            if record.get(key):  # 0 of a phase that was not reached says nothing
                histogram.observe(record[key])
        if record.get("staged_bytes"):
            self._staged.set(record["staged_bytes"])

    @_harmless
    def refused(self, code: str) -> None:
        """Count a request that got an error, by the error's code."""
        self._refused.labels(_among(REASONS, code)).inc()

    @_harmless
    def verification_failed(self, kind: str) -> None:
        """Count something that was not what it should be, by the name of the error's class."""
        self._failures.labels(_among(KINDS, kind)).inc()

    def _begin_at_zero(self) -> None:
        """A counter that appears with its first event has no increase that could be seen."""
        for reason in (*REASONS, OTHER):
            self._refused.labels(reason)
        for kind in (*KINDS, OTHER):
            self._failures.labels(kind)
        for outcome, phase in OUTCOMES.items():
            self._swaps.labels(outcome, phase)
        for result in ("hit", "miss"):
            self._plans.labels(result)

    def _show_active(self, status: Mapping[str, Any], active: Mapping[str, Any]) -> None:
        now = (
            printable(active["safety_vector"]),
            short(active["vector_digest"] or ""),
            short(active["plan_digest"] or ""),
            printable(status.get("weight_version") or ""),
        )
        for labels, value in list(api_servers.shown(self._active)):
            other = tuple(labels[name] for name in _LABELS)
            if not value or other == now:
                continue
            if api_servers.folder():  # files only grow
                self._active.labels(*other).set(0)
            else:
                self._active.remove(*other)
        self._active.labels(*now).set(1)

    def _count_merge(self, epoch: int, status: Mapping[str, Any]) -> None:
        """Once for each merge, though every API server sees it."""
        active = status["active"]
        merge = (str(epoch), active["vector_digest"], active["plan_digest"], str(active["beta"]))
        if merge == self._counted:
            return
        self._counted = merge
        if not api_servers.claim(merge):
            return
        if active.get("plan_cache") in ("hit", "miss"):
            self._plans.labels(active["plan_cache"]).inc()
        for kind, values in sorted((status.get("modules") or {}).items()):
            module = self._module(printable(kind))
            for histogram, key in (
                (self._attenuation, "attenuation"),
                (self._interference, "interference"),
            ):
                for value in values[key]:
                    histogram.labels(module).observe(value)

    def _module(self, kind: str) -> str:
        """A kind of module, or ``other``: a plan's names come from a file."""
        if len(self._modules) < _MOST_MODULES:
            self._modules.add(kind)
        return _among(self._modules, kind)


@functools.cache
def shared() -> ServerMetrics:
    """This process's metrics: registered when first asked for."""
    return ServerMetrics()


def _among(known: Iterable[str], value: str) -> str:
    return value if value in known else OTHER


def _number(value: float | None) -> float:
    """NaN, not 0, where there is none: no alert on a low share should think that there is one."""
    return math.nan if value is None else value
