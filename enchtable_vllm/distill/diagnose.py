"""The diagnosis of a trained surrogate, before it becomes a vector and goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enchtable_vllm.checkpoint import Location
from enchtable_vllm.distill.answers import AnswerBatch, batches
from enchtable_vllm.distill.disentangle import Disentanglement, measure_disentanglement
from enchtable_vllm.distill.encode import Example, collator
from enchtable_vllm.distill.linearity import Linearity, measure_linearity
from enchtable_vllm.distill.linearize import Tensors, choose_forward_mode
from enchtable_vllm.distill.loading import load_model


@dataclass(frozen=True)
class TaskDomain:
    """A fine-tune to measure disentanglement with.

    Attributes:
        task_model, base_model: The task vector is their difference.
        examples: Pairs of the task.
    """

    task_model: Location
    base_model: Location
    examples: Sequence[Example]


def diagnose(
    aligned: Location,
    surrogate: Path,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Example],
    *,
    attention: str,
    batch_size: int,
    domain: TaskDomain | None,
) -> tuple[Linearity, Disentanglement | None]:
    """Measure linearity, and disentanglement where there is a task to measure it with.

    Models are loaded anew, in fp32, without what training wrapped around them: two at a time, and
    a third while disentanglement is measured.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(aligned.path, attention=attention).to(device)
    choose_forward_mode(model)
    change = _difference(load_model(surrogate, attention=attention), model)
    collate = collator(model, tokenizer)

    def batched(examples: Sequence[Example]) -> list[AnswerBatch]:
        return list(batches(examples, collate, size=batch_size, device=device))

    linearity = measure_linearity(model, change, batched(held_out))
    if domain is None:
        return linearity, None
    safety = {name: -delta for name, delta in change.items()}
    base = load_model(domain.base_model.path, attention=attention).to(device)
    task = load_model(domain.task_model.path, attention=attention)
    return linearity, measure_disentanglement(
        base, _difference(task, base), safety, batched(domain.examples), batched(held_out)
    )


def _difference(one: PreTrainedModel, other: PreTrainedModel) -> Tensors:
    """Weights one − other, where they differ."""
    theirs = dict(other.named_parameters())
    out: Tensors = {}
    for name, parameter in one.named_parameters():
        delta = parameter.detach().to(theirs[name].device) - theirs[name].detach()
        if bool(delta.count_nonzero()):
            out[name] = delta
    return out
