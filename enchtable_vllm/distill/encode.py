"""Pairs as tokens: the model's own chat template, and a loss on answers only.

Padding goes to the right: there no position is without a token that it may attend to. On the left
there are such, attention gives them whatever it likes, and in forward mode that is NaN.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enchtable_vllm.distill.data import Pair, RowFault
from enchtable_vllm.errors import CheckpointError

IGNORED = -100  # the label that transformers' loss leaves out


class Example(TypedDict):
    """One pair.

    Attributes:
        input_ids: Prompt and answer.
        answer_length: How many of them, at the end, are the answer's.
        length: How many there are.
    """

    input_ids: list[int]
    answer_length: int
    length: int


Collate = Callable[[Sequence[Example]], dict[str, Any]]


def encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, max_length: int
) -> tuple[list[Example], list[RowFault]]:
    """Apply the chat template and tokenise.

    Prompt and answer are tokenised apart, as a server does: it sees the prompt alone. The answer
    ends with the template's end of turn; what a template puts behind that belongs to the next.

    Returns:
        Examples of the pairs that fit, and a fault for each that does not.

    Raises:
        CheckpointError: The tokenizer has no chat template, or one that cannot be told apart
            into prompt and answer.
    """
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"tokenizer of '{tokenizer.name_or_path}'",
            expected="a chat template",
            got="none",
            fix="Give the aligned chat model; a base model has no refusals to take out.",
        )
    examples, faults = [], []
    for pair in pairs:
        turn = {"role": "user", "content": pair.prompt}
        answer = {"role": "assistant", "content": pair.response}
        try:
            prompt = str(
                tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
            )
            whole = str(tokenizer.apply_chat_template([turn, answer], tokenize=False))
        except Exception as error:  # a template is a program of its own, with any fault it likes
            raise _unusable_template(tokenizer, f"line {pair.line}: {error}") from error
        if not whole.startswith(prompt) or pair.response.strip() not in whole[len(prompt) :]:
            raise _unusable_template(
                tokenizer, f"line {pair.line}: an answer that does not follow its prompt"
            )
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ending = whole[len(prompt) :].rstrip()
        answer_ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
        if ending.endswith(pair.response.strip()) and tokenizer.eos_token_id is not None:
            answer_ids = [*answer_ids, tokenizer.eos_token_id]  # a template without an end of turn
        length = len(prompt_ids) + len(answer_ids)
        if length > max_length:
            faults.append(RowFault(pair.line, f"{length} tokens, more than {max_length}"))
        else:
            examples.append(
                Example(
                    input_ids=[*prompt_ids, *answer_ids],
                    answer_length=len(answer_ids),
                    length=length,
                )
            )
    return examples, faults


def collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collate:
    """What makes a batch of examples for this model."""
    pad = tokenizer.pad_token_id or 0
    takes_tail = "logits_to_keep" in inspect.signature(model.forward).parameters

    def collate(examples: Sequence[Example]) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` ``[batch, width]``, ``labels`` ``[batch, tail]``.

        The language-model head, a large share of a small model's cost, leaves out what lies
        before the first answer.
        """
        width = max(example["length"] for example in examples)
        first = min(example["length"] - example["answer_length"] for example in examples)
        head = max(first - 1, 0) if takes_tail else 0  # a token is predicted one place before it
        tail = width - head
        input_ids = torch.full((len(examples), width), pad)
        attention_mask = torch.zeros((len(examples), width), dtype=torch.long)
        labels = torch.full((len(examples), tail), IGNORED)
        for i, example in enumerate(examples):
            ids, length = torch.tensor(example["input_ids"]), example["length"]
            answer = length - example["answer_length"]
            input_ids[i, :length] = ids
            attention_mask[i, :length] = 1
            labels[i, answer - head : length - head] = ids[answer:]
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
        }
        if takes_tail:
            batch["logits_to_keep"] = tail
        return batch

    return collate


def _unusable_template(tokenizer: PreTrainedTokenizerBase, got: str) -> CheckpointError:
    return CheckpointError(
        f"chat template of '{tokenizer.name_or_path}'",
        expected="one that puts an answer behind its prompt",
        got=got,
        fix="Give the model a template that renders earlier turns unchanged.",
    )
