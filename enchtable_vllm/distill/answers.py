"""What a model says at the answers' positions, under weights other than its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from enchtable_vllm.distill.encode import IGNORED, Collate, Example
from enchtable_vllm.distill.linearize import Tensors, first_order


@dataclass(frozen=True)
class AnswerBatch:
    """Inputs on the model's device, and where the answers are.

    Attributes:
        inputs: Of the model, without labels.
        places: ``[batch, tail]`` bool: logits there predict an answer's token.
        targets: ``[tokens]``: those tokens.
    """

    inputs: dict[str, Any]
    places: torch.Tensor
    targets: torch.Tensor


def batches(
    examples: Sequence[Example], collate: Collate, *, size: int, device: torch.device
) -> Iterator[AnswerBatch]:
    """Examples in their order."""
    for start in range(0, len(examples), size):
        made = collate(examples[start : start + size])
        labels = made.pop("labels")
        following = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        places = following != IGNORED
        yield AnswerBatch(
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in made.items()},
            places.to(device),
            following[places].to(device),
        )


def answer_logits(model: nn.Module, weights: Tensors, batch: AnswerBatch) -> torch.Tensor:
    """``[tokens, vocabulary]``, of the model with some of its weights replaced."""
    output = functional_call(model, weights, (), {**batch.inputs, "use_cache": False})
    logits: torch.Tensor = output.logits[batch.places]
    return logits


def expanded_logits(
    model: nn.Module, start: Tensors, change: Tensors, batch: AnswerBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at ``start``, and what ``change`` adds to them in first order."""
    value, tangent = first_order(lambda w: answer_logits(model, w, batch), start, change)
    return value, tangent


def own_weights(model: nn.Module, names: Iterable[str]) -> Tensors:
    """Some of a model's weights, by name."""
    held = dict(model.named_parameters())
    return {name: held[name].detach() for name in names}


def moved(start: Tensors, *steps: tuple[float, Tensors]) -> Tensors:
    """Weights start + Σ factor · change; a change may name fewer tensors than start."""
    out = dict(start)
    for factor, change in steps:
        for name, delta in change.items():
            out[name] = out[name] + factor * delta
    return out
