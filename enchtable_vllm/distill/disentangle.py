"""Weight disentanglement: whether task vector and safety vector leave each other alone.

With θ0 the base model, τ₁ the task vector (task − base) and τ₂ the safety vector (aligned −
surrogate), each with pairs of its own, D₁ and D₂, the disentanglement error is

    ξ(α₁, α₂) = Σ_{i = 1, 2}  E_{x ∈ D_i} [ dist( f(x; θ0 + α_i τ_i), f(x; θ0 + α₁τ₁ + α₂τ₂) ) ]

and 0 where adding one vector does not change what the other one's domain is answered. dist is the
prediction error: here the share of an answer's tokens whose most likely next token is another.
α₂ = −1 is the surrogate, which is where S was made; α₂ > 0 is the direction of a merge.

Source: Ortiz-Jimenez, Favero and Frossard, "Task Arithmetic in the Tangent Space: Improved Editing
of Pre-Trained Models", NeurIPS 2023 (arXiv 2305.12827), section 4, for the definition, there for
image classifiers; tokens in place of images are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from enchtable_vllm.distill.answers import AnswerBatch, answer_logits, moved, own_weights
from enchtable_vllm.distill.linearize import Tensors

GRID = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Disentanglement:
    """What was found.

    Attributes:
        alphas: The grid of both factors.
        error: ``error[i][j]`` is ξ(alphas[i], alphas[j]), in 0…2; task first, safety second.
        task_tokens, safety_tokens: How many of each domain were looked at.
    """

    alphas: tuple[float, ...]
    error: tuple[tuple[float, ...], ...]
    task_tokens: int
    safety_tokens: int

    @property
    def mean(self) -> float:
        """Over the grid's points where both vectors take part; elsewhere ξ is 0 on one side."""
        inner = [
            x
            for a, row in zip(self.alphas, self.error, strict=True)
            for b, x in zip(self.alphas, row, strict=True)
            if a and b
        ]
        return sum(inner) / len(inner)


@torch.no_grad()
def measure_disentanglement(
    model: nn.Module,
    task: Tensors,
    safety: Tensors,
    task_data: Sequence[AnswerBatch],
    safety_data: Sequence[AnswerBatch],
    *,
    alphas: Sequence[float] = GRID,
) -> Disentanglement:
    """Measure it.

    Args:
        model: The base model, in evaluation mode.
        task: τ₁, by parameter name, on the model's device.
        safety: τ₂, likewise.
        task_data: D₁.
        safety_data: D₂.
        alphas: The grid.
    """
    start = own_weights(model, {**task, **safety})

    def says(weights: Tensors, data: Sequence[AnswerBatch]) -> torch.Tensor:
        return torch.cat([answer_logits(model, weights, b).argmax(-1).cpu() for b in data])

    alone_task = [says(moved(start, (a, task)), task_data) for a in alphas]
    alone_safety = [says(moved(start, (a, safety)), safety_data) for a in alphas]
    rows = []
    for i, first in enumerate(alphas):
        row = []
        for j, second in enumerate(alphas):
            both = moved(start, (first, task), (second, safety))
            row.append(
                _differing(says(both, task_data), alone_task[i])
                + _differing(says(both, safety_data), alone_safety[j])
            )
        rows.append(tuple(row))
    return Disentanglement(tuple(alphas), tuple(rows), len(alone_task[0]), len(alone_safety[0]))


def _differing(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one != other).double().mean())
