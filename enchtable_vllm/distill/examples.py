"""From files of pairs to examples: checked, drawn, split, and accounted for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enchtable_vllm.checkpoint import Checkpoint, Location
from enchtable_vllm.distill.data import Pair, PairFile, read_pairs, refuse_faults, split
from enchtable_vllm.distill.diagnose import TaskDomain
from enchtable_vllm.distill.encode import Example, encode
from enchtable_vllm.distill.recipe import Recipe
from enchtable_vllm.errors import MismatchError, summarize_faults


@dataclass(frozen=True)
class Task:
    """What disentanglement is measured with: a fine-tune, its base, pairs of its task."""

    task_model: Location
    base_model: Location
    data: Path

    def paths(self) -> tuple[Path, Path, Path]:
        """What of it is read."""
        return self.task_model.path, self.base_model.path, self.data


def read_examples(
    data: Path,
    tokenizer: Any,
    recipe: Recipe,
    drop_duplicates: bool,
    say: Callable[[str], None],
) -> tuple[PairFile, list[Example], list[Example]]:
    """Read, template and split a file of pairs.

    Everything is checked, all pairs, before one is drawn: what is drawn is a matter of seeds.

    Args:
        data: The file.
        tokenizer: The aligned model's.
        recipe: For lengths, counts and the seed.
        drop_duplicates: Leave repeated rows out and count them.
        say: Told where the rows went.

    Returns:
        The file, and its examples: training, held out.

    Raises:
        TrainingDataError: Rows cannot be used, or none is left to train on.
        CheckpointError: The tokenizer's chat template is of no use.
    """
    file = read_pairs(data, drop_duplicates=drop_duplicates)
    examples, faults = encode(tokenizer, file.pairs, max_length=recipe.max_length)
    refuse_faults(file, faults)
    of_pair: dict[Pair, Example] = dict(zip(file.pairs, examples, strict=True))
    drawn = split(file.pairs, count=recipe.pairs, eval_share=recipe.eval_share, seed=recipe.seed)
    training, held_out = ([of_pair[pair] for pair in part] for part in drawn)
    if not training:
        refuse_faults(PairFile(file.name, file.digest, file.rows, (), file.safe, 0, ()))
    left_out = [f"{file.safe} safe"] * bool(file.safe)
    left_out += [f"{file.duplicates} repeated"] * bool(file.duplicates)
    rest = len(file.pairs) - len(training) - len(held_out)
    left_out += [f"{rest} not drawn"] * bool(rest)
    say(
        f"{file.rows} rows: {len(training)} pairs to train on, {len(held_out)} held out"
        + "".join(f", {text}" for text in left_out)
    )
    return file, training, held_out


def read_domain(task: Task, aligned: Checkpoint, tokenizer: Any, recipe: Recipe) -> TaskDomain:
    """A task's pairs and models, checked before anything is trained.

    Raises:
        TrainingDataError: Rows cannot be used.
        MismatchError: A model is not of the aligned model's kind.
    """
    for what, location in (("task model", task.task_model), ("base model", task.base_model)):
        checkpoint = Checkpoint(location.path, what=what)
        checkpoint.refuse_quantized()
        shapes, theirs = (
            {name: header.shape for name, header in c.tensors.items()}
            for c in (aligned, checkpoint)
        )
        names = sorted(n for n in shapes | theirs if shapes.get(n) != theirs.get(n))
        if names:
            raise MismatchError(
                checkpoint.what,
                expected="the aligned model's tensors, shape by shape",
                got=summarize_faults([f"'{name}'" for name in names]),
                fix="Give a base model and a fine-tune of its architecture and vocabulary.",
            )
    file = read_pairs(task.data)
    examples, faults = encode(tokenizer, file.pairs, max_length=recipe.max_length)
    refuse_faults(file, faults)
    return TaskDomain(task.task_model, task.base_model, examples)
