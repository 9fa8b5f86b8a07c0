"""OpenTelemetry spans where vLLM traces (``--otlp-traces-endpoint``), and nothing elsewhere.

vLLM sets a tracer provider up in its API servers, engine cores and workers; without one, or
without the package, a span costs next to nothing. In a worker vLLM's own spans of loading are
open already, so ours appear inside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

_trace: Any
try:
    _trace = import_module("opentelemetry.trace")
except ImportError:  # vLLM brings it; an installation may leave it out
    _trace = None


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[dict[str, Any]]:
    """A span around a block; an error that leaves the block is recorded in it and goes on.

    Args:
        name: Such as ``enchtable.load``.
        attributes: Of the span, under ``enchtable.``; None is left out.

    Yields:
        More attributes, to be filled with what the block finds out.
    """
    found: dict[str, Any] = {}
    if _trace is None:
        yield found
        return
    with _trace.get_tracer("enchtable_vllm").start_as_current_span(name) as current:
        try:
            yield found
        finally:
            for key, value in (attributes | found).items():
                if value is not None:
                    current.set_attribute(f"enchtable.{key}", value)
