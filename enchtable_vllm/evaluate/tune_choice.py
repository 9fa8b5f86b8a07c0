"""Which β to try next, and which to propose: arithmetic on what has been measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from enchtable_vllm.evaluate.report import Rate

#: A search begins with so many, evenly spaced in the exponent: β acts by factors.
_FIRST = 4
#: Two β closer than this factor are one, as far as any sample can tell.
_CLOSEST = 1.05


class Step(BaseModel):
    """One β, measured.

    Attributes:
        beta: None: no vector at all, what the others are held against.
        folder: Of its report, in the tuning's own.
        unsafe: Over all safety sets of the validation split.
        worst: The same, if every unparseable verdict and every failed prompt were unsafe. It is
            what is chosen by: a β that leaves answers no judge can read must not win by it.
        utility: Over all utility sets.
        over_refusal: Over all harmless sets; None where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta: float | None
    folder: str
    unsafe: Rate
    worst: Rate
    utility: Rate
    over_refusal: Rate | None = None

    @property
    def doubts(self) -> int:
        """How many of the safety sets' prompts have no verdict."""
        return self.worst.of - self.unsafe.of

    @property
    def name(self) -> str:
        """For people."""
        return "no vector" if self.beta is None else f"beta {self.beta:g}"


@dataclass(frozen=True)
class Budget:
    """What safety may cost, in shares: 0.01 is a point.

    Attributes:
        utility: How much less than without a vector.
        over_refusal: How much more than without a vector; None: it does not matter.
    """

    utility: float
    over_refusal: float | None = None

    def allows(self, step: Step, without: Step) -> bool:
        """Whether a step stays within it, by the measured shares."""
        if _share(step.utility) < _share(without.utility) - self.utility - 1e-12:
            return False
        if self.over_refusal is None or step.over_refusal is None or without.over_refusal is None:
            return True
        limit = _share(without.over_refusal) + self.over_refusal + 1e-12
        return _share(step.over_refusal) <= limit


def propose(steps: Sequence[Step], budget: Budget) -> Step | None:
    """The step with the lowest `worst` rate within a budget; of equals the smallest β.

    Returns:
        None: no step is within the budget, or none was judged.
    """
    without = next(step for step in steps if step.beta is None)
    within = [
        step
        for step in steps
        if step.beta is not None and step.unsafe.share is not None and budget.allows(step, without)
    ]
    return min(within, key=lambda step: (step.worst.share, step.beta), default=None)


def next_beta(
    steps: Sequence[Step], budget: Budget, low: float, high: float, count: int
) -> float | None:
    """Where a search looks next: a grid first, then around the best that is within the budget.

    Args:
        steps: What was measured, the step without a vector among it.
        budget: What safety may cost.
        low: The smallest β.
        high: The largest β.
        count: How many β to measure in all.

    Returns:
        None: it is done.
    """
    tried = sorted(step.beta for step in steps if step.beta is not None)
    if len(tried) >= count:
        return None
    first = min(_FIRST, count)
    grid = [low * (high / low) ** (k / max(first - 1, 1)) for k in range(first)]
    for beta in map(_rounded, grid):
        if not any(_same(beta, other) for other in tried):
            return beta
    best = propose(steps, budget)
    # Without one within the budget, a smaller β may be: look below the smallest.
    centre = tried[0] if best is None or best.beta is None else best.beta
    place = tried.index(centre)
    gaps = []
    if place > 0:
        gaps.append((tried[place - 1], centre))
    if place + 1 < len(tried):
        gaps.append((centre, tried[place + 1]))
    for lower, upper in sorted(gaps, key=lambda gap: gap[1] / gap[0], reverse=True):
        middle = _rounded(math.sqrt(lower * upper))
        if not (_same(middle, lower) or _same(middle, upper)):
            return middle
    return None


def _rounded(beta: float) -> float:
    return float(f"{beta:.3g}")


def _same(one: float, other: float) -> bool:
    return max(one, other) / min(one, other) < _CLOSEST


def _share(rate: Rate) -> float:
    return 0.0 if rate.share is None else rate.share
