"""How linear the surrogate's behaviour is in the safety vector.

The NTK regime is a claim: that along θ_aligned − t·S, for t in 0…1, the model behaves as its
first-order expansion at t = 0. Here it is measured, on pairs that did not train.

Three curves of the mean loss of an answer's token:

- *actual*: of the model with the weights θ_aligned − t·S;
- *tangent*: L(0) + t·L′(0), with L′(0) the directional derivative along −S;
- *expanded*: of the logits f(θ_aligned) + t·J(−S). A loss bends even where the logits do not, so
  this curve, not the tangent, is what the actual one follows in the NTK regime.

And two numbers, both 0 for a model that is linear in its weights:

- *logit error*: ‖f(θ_surrogate) − f(θ_aligned) − J(−S)‖ / ‖f(θ_surrogate) − f(θ_aligned)‖ over all
  logits at the answers' positions: the part of the change that first order does not explain.
  At 1 it explains nothing.
- *loss error*: the largest |actual − expanded| over t, relative to |L(1) − L(0)|.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from enchtable_vllm.distill.answers import (
    AnswerBatch,
    answer_logits,
    expanded_logits,
    moved,
    own_weights,
)
from enchtable_vllm.distill.linearize import Tensors


@dataclass(frozen=True)
class Linearity:
    """What was found.

    Attributes:
        t: From 0, the aligned model, to 1, the surrogate.
        actual, tangent, expanded: Mean losses at each t.
        derivative: L′(0).
        logit_error, loss_error: None where surrogate and aligned model say the same.
        tokens: How many of the answers' tokens were looked at.
    """

    t: tuple[float, ...]
    actual: tuple[float, ...]
    tangent: tuple[float, ...]
    expanded: tuple[float, ...]
    derivative: float
    logit_error: float | None
    loss_error: float | None
    tokens: int


#: By as many units in the last place two computations of the same logits may differ: which kernels
#: they take is the machine's choice.
_ROUNDINGS = 64


@torch.no_grad()
def measure_linearity(
    model: nn.Module, change: Tensors, data: Iterable[AnswerBatch], *, points: int = 11
) -> Linearity:
    """Measure it.

    Args:
        model: The aligned model, fp32 or fp64, in evaluation mode.
        change: −S: surrogate − aligned, by parameter name, on the model's device.
        data: Held-out pairs.
        points: How many values of t, both ends included.
    """
    start = own_weights(model, change)
    steps = [i / (points - 1) for i in range(points)]
    actual, expanded = [0.0] * points, [0.0] * points
    slope = unexplained = whole = said = 0.0
    rounding = _ROUNDINGS * torch.finfo(next(iter(start.values())).dtype).eps
    tokens = 0
    for batch in data:
        value, tangent = expanded_logits(model, start, change, batch)
        tokens += len(batch.targets)
        # d/dt of the cross-entropy of value + t·tangent at 0: (softmax − one-hot) · tangent.
        mean = (value.softmax(-1) * tangent).sum(-1)
        picked = tangent.gather(-1, batch.targets[:, None])[:, 0]
        slope += float((mean - picked).double().sum())
        for i, t in enumerate(steps):
            logits = answer_logits(model, moved(start, (t, change)), batch)
            actual[i] += _loss(logits, batch)
            expanded[i] += _loss(value + t * tangent, batch)
            if i == points - 1:
                unexplained += float((logits - value - tangent).double().square().sum())
                whole += float((logits - value).double().square().sum())
                said += float(value.double().square().sum())
    actual = [x / tokens for x in actual]
    expanded = [x / tokens for x in expanded]
    slope /= tokens
    span = abs(actual[-1] - actual[0])
    gap = max(abs(a - e) for a, e in zip(actual, expanded, strict=True))
    return Linearity(
        t=tuple(steps),
        actual=tuple(actual),
        tangent=tuple(actual[0] + t * slope for t in steps),
        expanded=tuple(expanded),
        derivative=slope,
        logit_error=math.sqrt(unexplained / whole) if whole > rounding**2 * said else None,
        loss_error=gap / span if span > rounding * abs(actual[0]) else None,
        tokens=tokens,
    )


def _loss(logits: torch.Tensor, batch: AnswerBatch) -> float:
    return float(cross_entropy(logits.double(), batch.targets, reduction="sum"))
