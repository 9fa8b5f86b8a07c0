"""Brief supervised fine-tuning of the aligned model and of the task model.

By the same code that trains a surrogate: fp32 masters, a loss on answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enchtable_vllm.demo.data import Pair
from enchtable_vllm.distill import data, encode, training
from enchtable_vllm.distill.parameters import choose_parameters
from enchtable_vllm.distill.precision import computes_bf16
from enchtable_vllm.distill.recipe import Recipe


def brief(**settings: Any) -> Recipe:
    """Minutes on two cores: large batches of like length, nothing held out, nothing to resume."""
    common = {
        "epochs": 2,
        "batch_size": 16,
        "gradient_accumulation": 1,
        "warmup_steps": 5,
        "group_by_length": True,
        "eval_share": 0.0,
        "save_steps": 0,
        "bf16": computes_bf16(),
        "attention": "eager",  # a quarter faster to train with than sdpa on a CPU
    }
    return Recipe(**{**common, **settings})


def aligning() -> Recipe:
    """Of a model that learns to refuse, beside thousands of harmless answers, one time each."""
    return brief(scope="attention+ffn", epochs=1, batch_size=32, learning_rate=2e-4)


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
        pairs: The examples; all of them fit.
        recipe: The run's settings.
        scratch: A folder that Trainer may write to.
    """
    choose_parameters(model, recipe.scope)
    fit(model, tokenizer, pairs, recipe, scratch)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    recipe: Recipe,
    scratch: Path,
) -> None:
    """As `train`, but of those parameters that require gradients: of an adapter, say."""
    rows = [data.Pair(i, pair.question, pair.answer) for i, pair in enumerate(pairs, 1)]
    examples, _ = encode.encode(tokenizer, rows, max_length=recipe.max_length)
    arguments = training.training_arguments(recipe, scratch)
    training.train(
        model, tokenizer, examples, [], arguments, group_by_length=recipe.group_by_length
    )
    model.eval()
