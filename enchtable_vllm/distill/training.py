"""Training of a surrogate, by transformers' own Trainer.

Weights are fp32 masters under bf16 autocast: a safety vector is a small difference, of which
16-bit weights would keep next to nothing.

Why Trainer and not TRL's SFTTrainer, which is a Trainer too: what that adds is the preparation of
data, and there it cuts what is too long, where here a pair that does not fit has to be refused
with its line; and it brings ``datasets``, for a file of a thousand lines. Schedules, accumulation,
mixed precision, checkpoints, resuming and several processes are Trainer's and accelerate's in both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from enchtable_vllm.distill.encode import Example, collator
from enchtable_vllm.distill.recipe import Recipe
from enchtable_vllm.errors import NonFiniteError


@dataclass(frozen=True)
class Step:
    """One row of the loss curve: a step, or an evaluation of the held-out pairs after it."""

    step: int
    epoch: float
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    eval_loss: float | None = None


def training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """The recipe in Trainer's words. Making them also joins the processes of a launch.

    Args:
        recipe: The settings.
        folder: Where checkpoints to resume from are kept.
    """
    on_cpu = not torch.cuda.is_available()
    made = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps or recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=recipe.bf16,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        prediction_loss_only=True,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 1,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # what is not finite is to be seen, and ends the run
        report_to=[],
        seed=recipe.seed,
    )
    if made.n_gpu > 1:
        # Not launched on several GPUs, Trainer would still use all that it sees, by DataParallel:
        # as many times the batch, no autocast, and no expansion, whose θ0 is on one of them.
        made._n_gpu = 1
    return made


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[Example],
    held_out: Sequence[Example],
    arguments: TrainingArguments,
    *,
    group_by_length: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Trainer, list[Step]]:
    """Fine-tune ``model`` in place; go on from the newest whole checkpoint in the folder.

    Args:
        model: fp32, its parameters chosen, linearised if it is to be.
        tokenizer: For padding.
        training: Examples to train on.
        held_out: Examples to evaluate on after each epoch.
        arguments: From `training_arguments`.
        group_by_length: Put pairs of like length into one batch.
        callbacks: Further ones.

    Returns:
        The trainer, which knows how to save from several processes, and the loss curve.

    Raises:
        NonFiniteError: The loss became NaN or infinite.
    """
    set_seed(arguments.seed)
    used_cache, model.config.use_cache = model.config.use_cache, False
    callbacks = [_Finite(), *([_EachEpoch()] if held_out else []), *callbacks]
    trainer = (_ByLengthTrainer if group_by_length else Trainer)(
        model=model,
        args=arguments,
        train_dataset=list(training),
        eval_dataset=list(held_out) or None,
        data_collator=collator(model, tokenizer),
        callbacks=callbacks,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar)
    trainer.train(resume_from_checkpoint=newest_checkpoint(Path(arguments.output_dir)))
    model.config.use_cache = used_cache
    return trainer, _curve(trainer.state.log_history)


class _ByLength(LengthGroupedSampler):  # type: ignore[misc]  # transformers is untyped here
    """Trainer's own order by length, but of seed and epoch alone.

    Trainer draws it from torch's global generator, whose state a resumed run meets in the middle
    of an epoch: it would go on in another order.
    """

    def __init__(self, seed: int, batch_size: int, lengths: list[int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, the one that is resumed too: see `_Epochs`."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(super().__iter__())


class _ByLengthTrainer(Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, train_dataset: Any = None) -> _ByLength:
        examples = train_dataset or self.train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        sampler = _ByLength(self.args.seed, batch, [example["length"] for example in examples])
        self.add_callback(_Epochs(sampler))
        return sampler


class _Epochs(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Tells the order by length which epoch begins.

    Trainer tells it too, but not where a run of several processes goes on within an epoch: there
    accelerate has wrapped it once more.
    """

    def __init__(self, sampler: _ByLength) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """One that was begun, or that comes after one that has ended."""
        self._sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class _EachEpoch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Evaluates after an epoch's last step, before that step is saved.

    Trainer's own time for it is after: a run that goes on from there would miss it.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Evaluate now, if it was the last."""
        if state.global_step % (state.max_steps // int(args.num_train_epochs)) == 0:
            control.should_evaluate = True
        return control


def newest_checkpoint(folder: Path) -> str | None:
    """The newest that was written to its end: Trainer writes its state last."""
    whole = [
        path.parent
        for path in folder.glob("checkpoint-*/trainer_state.json")
        if _is_json(path) and path.parent.name.removeprefix("checkpoint-").isdecimal()
    ]
    newest = max(whole, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)
    return None if newest is None else str(newest)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _curve(history: Sequence[dict[str, Any]]) -> list[Step]:
    keys = ("loss", "learning_rate", "grad_norm", "eval_loss")
    return [
        Step(row["step"], row["epoch"], **{k: float(row[k]) for k in keys if k in row})
        for row in history
        if "loss" in row or "eval_loss" in row
    ]


class _Finite(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Ends a run that has diverged, instead of saving what came of it."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Look at every logged loss."""
        logs = kwargs.get("logs") or {}
        for key in ("loss", "eval_loss", "grad_norm"):
            if key in logs and not math.isfinite(logs[key]):
                raise NonFiniteError(
                    f"training, step {state.global_step}",
                    expected=f"a finite {key}",
                    got=logs[key],
                    fix="Give a smaller --learning-rate, or more warm-up.",
                )


class _Bar(ProgressCallback):  # type: ignore[misc]  # transformers is untyped here
    """Trainer's bar, on standard error, with the loss in it in place of printed dictionaries."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the loss."""
        logs = kwargs.get("logs") or {}
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}", refresh=False)
