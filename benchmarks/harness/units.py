"""Figures as people read them."""

from __future__ import annotations

_SECONDS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))
_SPEEDS = ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"))
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def shown(value: float, unit: str) -> str:
    """Three digits and a unit of the fitting size."""
    scales = {"s": _SECONDS, "B": _BYTES, "B/s": _SPEEDS}.get(unit, ())
    for size, name in scales:
        if abs(value) >= (2 if name in ("d", "h", "min") else 1) * size:
            return f"{_digits(value / size)} {name}"
    return f"{_digits(value)} {unit}".strip()


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
