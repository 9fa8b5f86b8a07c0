"""Models and tokenizers by transformers, its refusals as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from enchtable_vllm.errors import CheckpointError


def load_model(folder: Path, *, attention: str = "sdpa") -> PreTrainedModel:
    """A checkpoint as an fp32 model, whatever it is stored in.

    Raises:
        CheckpointError: transformers cannot make a causal language model of it.
    """
    with _refusing(f"model '{folder}'", "a causal language model that transformers knows"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A model's own tokenizer.

    Raises:
        CheckpointError: There is none that transformers can use.
    """
    with _refusing(f"model '{folder}'", "a tokenizer beside the weights"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


@contextmanager
def _refusing(what: str, expected: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            what,
            expected=expected,
            got=f"{type(error).__name__}: {error}",
            fix="Check its config and tokenizer files; code of a model's own is never run.",
        ) from error
