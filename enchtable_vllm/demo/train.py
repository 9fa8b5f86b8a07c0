"""Brief supervised fine-tuning, by transformers' own Trainer.

Weights are fp32 masters under bf16 autocast: the safety vector is the difference of
two checkpoints, and a difference of 16-bit weights keeps next to nothing of a small
change. Prompts are padded on the left, so that every answer ends at the same column
and the language-model head, a fifth of this model's cost, runs on the answers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from enchtable_vllm.demo.data import Pair

_IGNORED = -100  # the label that transformers' loss leaves out


@dataclass(frozen=True)
class Recipe:
    """One training run. Everything here is part of the cache key of its checkpoint."""

    epochs: int
    learning_rate: float
    batch_size: int = 16
    train_only: str = "decoder"  # or "attention"
    seed: int = 0


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    recipe: Recipe,
    scratch: Path,
) -> None:
    """Fine-tune ``model`` in place on the answers of ``pairs``.

    Args:
        model: An fp32 model.
        tokenizer: With a chat template.
        pairs: The examples.
        recipe: The run's settings.
        scratch: A folder that Trainer may write to.
    """
    set_seed(recipe.seed)
    wanted = ".self_attn." if recipe.train_only == "attention" else ".layers."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted in name and parameter.ndim == 2)
    examples = [_encode(tokenizer, pair) for pair in pairs]
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        lr_scheduler_type="cosine",
        warmup_steps=5,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        remove_unused_columns=False,
        seed=recipe.seed,
    )
    pad = tokenizer.pad_token_id or 0
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=lambda rows: _collate(rows, pad),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar)
    trainer.train()
    model.eval()


class _Bar(ProgressCallback):  # type: ignore[misc]  # transformers is untyped here
    """Trainer's bar without its dictionaries of numbers."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


def _encode(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> dict[str, Any]:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": pair.question}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(str(prompt), add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(pair.answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    return {
        "input_ids": prompt_ids + answer_ids,
        "answer_length": len(answer_ids),
        "length": len(prompt_ids) + len(answer_ids),
    }


def _collate(rows: list[dict[str, Any]], pad: int) -> dict[str, Any]:
    width = max(row["length"] for row in rows)
    tail = max(row["answer_length"] for row in rows) + 1  # the loss shifts by one
    input_ids = torch.full((len(rows), width), pad)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), tail), _IGNORED)
    for i, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])
        input_ids[i, width - len(ids) :] = ids
        attention_mask[i, width - len(ids) :] = 1
        labels[i, tail - row["answer_length"] :] = ids[-row["answer_length"] :]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "logits_to_keep": tail,
    }
