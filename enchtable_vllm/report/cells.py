"""A plan's matrices, gathered into a grid of layers and modules.

A model of seventy billion parameters has 560 such cells. The experts of one layer share one: a
mixture of thousands of experts has no more cells than a dense model, and each says what its
least and its most favoured expert get.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from enchtable_vllm.plan import ResolvedPlan
from enchtable_vllm.plan.summary import module_kind

Measure = Literal["interference", "attenuation", "coefficient", "retained_share"]

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_MOST_DIGITS = 9  # of a layer's number: a longer one is a name


@dataclass(frozen=True)
class Spread:
    """Least, median and greatest of some numbers."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one."""
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class Matrix:
    """One matrix that is merged, with the numbers in force.

    Attributes:
        name: Of its tensor.
        expert: Its place in a stack of experts; None of a tensor that is one matrix.
        retained_share: Of its tensor, expected; None where no plan said it for this norm scale.
        rungs: Which algorithms its factors needed: task's, safety's.
    """

    name: str
    expert: int | None
    interference: float
    attenuation: float
    coefficient: float
    retained_share: float | None
    rungs: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """All matrices of one module in one layer.

    Attributes:
        stack: What the layers are of: ``model.layers``; empty outside of layers.
        layer: None outside of layers.
        module: Such as ``self_attn.q_proj``.
        tensors, matrices: How many.
        retained_share: None where it is not known.
        safety_norm: ‖S‖₂ over its deltas.
        change_norm: ‖c · S‖₂: how far it is to be moved. A stack counts with the root mean
            square of its coefficients, as if its matrices' deltas had one norm.
    """

    stack: str
    layer: int | None
    module: str
    tensors: int
    matrices: int
    interference: Spread
    attenuation: Spread
    coefficient: Spread
    retained_share: Spread | None
    safety_norm: float
    change_norm: float


def matrices(resolved: ResolvedPlan) -> list[Matrix]:
    """Every matrix that is merged, in the order of the plan's names."""
    plan, n = resolved.plan, resolved.norm_scale
    as_planned = math.isclose(n, plan.norm_scale)
    found = []
    for name, row in sorted(resolved.coefficients.items()):
        tensor = plan.tensors[name]
        for index, (a, b, coefficient) in enumerate(zip(tensor.a, tensor.b, row, strict=True)):
            found.append(
                Matrix(
                    name,
                    index if len(row) > 1 else None,
                    a * n + b,
                    math.exp(-(a * n + b)),
                    coefficient,
                    tensor.retained_share if as_planned else None,
                    tensor.rungs[index] if index < len(tensor.rungs) else (),
                )
            )
    return found


def cells(resolved: ResolvedPlan, found: Sequence[Matrix]) -> list[Cell]:
    """The grid, by stack, module and layer."""
    groups: dict[tuple[str, str, int], dict[str, list[Matrix]]] = defaultdict(dict)
    for matrix in found:
        groups[place(matrix.name)].setdefault(matrix.name, []).append(matrix)
    return [_cell(resolved, key, by_tensor) for key, by_tensor in sorted(groups.items())]


def place(name: str) -> tuple[str, str, int]:
    """Stack, module and layer of a tensor; ``("", module, -1)`` outside of layers."""
    layer = _LAYER.match(name)
    if layer is None or len(layer[2]) > _MOST_DIGITS:
        return "", name.removesuffix(".weight"), -1
    return layer[1], module_kind(name), int(layer[2])


def _cell(
    resolved: ResolvedPlan, key: tuple[str, str, int], by_tensor: dict[str, list[Matrix]]
) -> Cell:
    stack, module, layer = key
    rows = [matrix for row in by_tensor.values() for matrix in row]
    norms = {name: resolved.plan.tensors[name].safety_norm or 0.0 for name in by_tensor}
    changes = (
        norms[name] * math.sqrt(statistics.fmean(m.coefficient**2 for m in row))
        for name, row in by_tensor.items()
    )
    shares = [m.retained_share for m in rows if m.retained_share is not None]
    return Cell(
        stack,
        None if layer < 0 else layer,
        module,
        len(by_tensor),
        len(rows),
        Spread.of([m.interference for m in rows]),
        Spread.of([m.attenuation for m in rows]),
        Spread.of([m.coefficient for m in rows]),
        Spread.of(shares) if shares else None,
        math.hypot(*norms.values()),
        math.hypot(*changes),
    )


def by_stack(grid: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """The cells that have a layer, a stack of layers at a time."""
    stacks: dict[str, list[Cell]] = defaultdict(list)
    for cell in grid:
        if cell.layer is not None:
            stacks[cell.stack].append(cell)
    yield from stacks.items()
