"""A training run in numbers. The defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from enchtable_vllm.errors import ConfigError, summarize_faults
from enchtable_vllm.vector import SCOPES, Scope

Linearize = Literal["none", "module", "model"]
Attention = Literal["sdpa", "eager"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the surrogate is, beside the aligned model and the pairs.

    Attributes:
        scope: Which parameters train.
        linearize: What is replaced by its first-order expansion; see `distill.linearize`.
        pairs: How many pairs train; all that are left after the held-out ones if there are fewer.
        epochs, learning_rate: Of AdamW, on a cosine that ends at zero.
        batch_size: Pairs that one process takes at once.
        gradient_accumulation: Batches to one step. Pairs a step: batch size, times this, times
            the number of processes.
        warmup_ratio: The share of steps in which the learning rate rises.
        warmup_steps: Their number, where it is not zero; goes before the ratio.
        max_length: Tokens of a whole templated pair; a longer one is refused, not cut.
        max_grad_norm: Gradients are clipped to it.
        weight_decay: AdamW's; zero, because decay is a change that no data asked for.
        eval_share: The share of the pairs that is held out.
        seed: Of the split, the order, and torch.
        bf16: bf16 autocast; the weights themselves are fp32 always. Not in its words (repr): it
            follows the machine, and what is named after a recipe is found again on another.
        gradient_checkpointing: Recompute activations instead of keeping them.
        attention: transformers' implementation of it.
        group_by_length: Put pairs of like length into one batch: less padding, another order.
        save_steps: How many steps lie between two checkpoints to resume from; 0: there are none.

    Source: arXiv 2511.09880, the Llama-3-8B run: 1,000 pairs, 4 epochs, 1e-5, cosine, warm-up
    0.1, batch 2×4, bf16, length 2,048.
    """

    scope: Scope = "attention"
    linearize: Linearize = "none"
    pairs: int = 1000
    epochs: int = 4
    learning_rate: float = 1e-5
    batch_size: int = 2
    gradient_accumulation: int = 4
    warmup_ratio: float = 0.1
    warmup_steps: int = 0
    max_length: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    eval_share: float = 0.05
    seed: int = 0
    bf16: bool = field(default=True, repr=False)
    gradient_checkpointing: bool = False
    attention: Attention = "sdpa"
    group_by_length: bool = False
    save_steps: int = 100

    def check(self) -> None:
        """Refuse what cannot be trained with.

        Raises:
            ConfigError: All faults at once.
        """
        faults = [
            f"{name} {getattr(self, name)!r}"
            for name in ("pairs", "epochs", "batch_size", "gradient_accumulation")
            if not getattr(self, name) >= 1
        ]
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            faults.append(f"learning_rate {self.learning_rate!r}")
        if not 0 <= self.warmup_ratio < 1 or self.warmup_steps < 0:
            faults.append(f"warm-up {self.warmup_ratio!r} / {self.warmup_steps!r}")
        if not 0 <= self.eval_share < 1:
            faults.append(f"eval_share {self.eval_share!r}")
        if not self.max_length >= 2 or self.save_steps < 0:
            faults.append(f"max_length {self.max_length!r}, save_steps {self.save_steps!r}")
        if not (self.max_grad_norm > 0 and 0 <= self.weight_decay < math.inf):
            faults.append(f"max_grad_norm {self.max_grad_norm!r}, decay {self.weight_decay!r}")
        for name, kind in (("scope", SCOPES), ("linearize", get_args(Linearize)),
                           ("attention", get_args(Attention))):  # fmt: skip
            if getattr(self, name) not in kind:
                faults.append(f"{name} {getattr(self, name)!r}")
        if faults:
            raise ConfigError(
                "the recipe",
                expected="counts of at least 1, a positive finite learning rate, shares in [0, 1), "
                "and names that there are",
                got=summarize_faults(faults),
                fix="See 'enchtable distill --help' for the options and their defaults.",
            )

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)
