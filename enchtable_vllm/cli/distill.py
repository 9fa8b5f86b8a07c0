"""``enchtable distill``: train a surrogate, write the safety vector and its report."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from enchtable_vllm.checkpoint import locate
from enchtable_vllm.cli.options import JsonOption
from enchtable_vllm.cli.output import errors, out, print_json, progress_bar, say, warn
from enchtable_vllm.distill.recipe import Attention, Linearize, Recipe
from enchtable_vllm.errors import ConfigError, TrainingDataError, printable
from enchtable_vllm.progress import Progress
from enchtable_vllm.vector import SafetyVector, Scope
from enchtable_vllm.vector.build import StoredDtype

if TYPE_CHECKING:
    from enchtable_vllm.distill.examples import Task
    from enchtable_vllm.distill.linearity import Linearity
    from enchtable_vllm.distill.report import DistilReport

_PAPER = Recipe()


def distill(
    model: Annotated[str, typer.Option(help="The aligned model: folder or Hub id\\[@revision].")],
    data: Annotated[
        Path, typer.Option(help="JSON lines with prompt and response, or BeaverTails' layout.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The vector's folder.")],
    scope: Annotated[Scope, typer.Option(help="Which parameters train.")] = _PAPER.scope,
    linearize: Annotated[
        Linearize,
        typer.Option(
            help="Train the first-order expansion of each feed-forward block, or of the whole "
            "model."
        ),
    ] = _PAPER.linearize,
    pairs: Annotated[int, typer.Option(help="How many pairs train.", min=1)] = _PAPER.pairs,
    epochs: Annotated[int, typer.Option(help="How often each pair trains.", min=1)] = _PAPER.epochs,
    learning_rate: Annotated[
        float, typer.Option(help="Its peak; a cosine follows.")
    ] = _PAPER.learning_rate,
    warmup_ratio: Annotated[
        float, typer.Option(help="The share of steps before the peak.", min=0, max=0.999)
    ] = _PAPER.warmup_ratio,
    batch_size: Annotated[
        int, typer.Option(help="Pairs at once, in each process.", min=1)
    ] = _PAPER.batch_size,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Batches to a step.", min=1)
    ] = _PAPER.gradient_accumulation,
    max_length: Annotated[
        int, typer.Option(help="Tokens of a pair; a longer one is refused.", min=2)
    ] = _PAPER.max_length,
    eval_share: Annotated[
        float, typer.Option(help="The share of pairs that is held out.", min=0, max=0.999)
    ] = _PAPER.eval_share,
    seed: Annotated[
        int, typer.Option(help="Of the split and of the order of pairs.", min=0)
    ] = _PAPER.seed,
    bf16: Annotated[
        bool, typer.Option("--bf16/--fp32", help="Autocast; the weights are fp32 either way.")
    ] = _PAPER.bf16,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    attention: Annotated[
        Attention, typer.Option(help="transformers' implementation of it.")
    ] = _PAPER.attention,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Batches of like length: less padding.")
    ] = False,
    save_steps: Annotated[
        int, typer.Option(help="Steps between two checkpoints to resume from; 0: none.", min=0)
    ] = _PAPER.save_steps,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run.")
    ] = True,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave repeated rows out, and count them.")
    ] = False,
    dtype: Annotated[
        StoredDtype, typer.Option(help="How deltas are stored; int8 has a scale for each 64.")
    ] = "bf16",
    keep_surrogate: Annotated[
        Path | None, typer.Option(help="Keep the unsafe model too, in this folder.")
    ] = None,
    task_model: Annotated[
        str | None, typer.Option(help="Measure disentanglement with this fine-tune,")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="what it was tuned from,")] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="and pairs of its task (prompt, response).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Distil a safety vector: train a surrogate toward compliance, and subtract it.

    Defaults are the paper's. The surrogate is a model made to be unsafe, and is not kept unless
    asked; handle the vector like it: subtracted from the aligned model it gives that model back.
    Needs the 'distill' extra. Several GPUs: accelerate launch -m enchtable_vllm.cli distill ...
    """
    recipe = Recipe(
        scope=scope,
        linearize=linearize,
        pairs=pairs,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        warmup_ratio=warmup_ratio,
        max_length=max_length,
        eval_share=eval_share,
        seed=seed,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        attention=attention,
        group_by_length=group_by_length,
        save_steps=save_steps,
    )
    recipe.check()
    try:
        from enchtable_vllm.distill.run import distil
    except ImportError as error:
        raise ConfigError(
            "'enchtable distill'",
            expected="the packages of the 'distill' extra",
            got=error,
            fix="Install them: pip install 'enchtable-vllm[distill]'.",
        ) from error
    task = _task(task_model, base_model, task_data)
    try:
        with ExitStack() as stack:
            bar: list[Progress] = []

            def progress(name: str, done: int, total: int) -> None:
                """Not before there is something to write: training has a bar of its own."""
                bar[:] = bar or [stack.enter_context(progress_bar("Writing"))]
                bar[0](name, done, total)

            report = distil(
                locate(model, what="aligned model"),
                data,
                output,
                recipe,
                dtype=dtype,
                keep_surrogate=keep_surrogate,
                task=task,
                drop_duplicates=drop_duplicates,
                overwrite=overwrite,
                resume=resume,
                say=_tell,
                progress=progress,
            )
    except TrainingDataError as error:
        for fault in error.faults:
            _tell(fault)
        raise
    if report is None:  # not the first process of a launch
        return
    for warning in report.build.warnings:
        warn(warning)
    if not report.pictures:
        warn("no PNG was drawn, because matplotlib is not installed; the numbers are all there")
    if as_json:
        fingerprint = SafetyVector.open(output).fingerprint
        print_json({"output": str(output), "fingerprint": fingerprint, **report.to_json()})
    else:
        _print(report, output, keep_surrogate)


def _tell(line: str) -> None:
    errors.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _task(task_model: str | None, base_model: str | None, data: Path | None) -> Task | None:
    from enchtable_vllm.distill.examples import Task

    if task_model is None and base_model is None and data is None:
        return None
    if task_model is None or base_model is None or data is None:
        raise ConfigError(
            "--task-model, --base-model, --task-data",
            expected="all three, or none",
            got="some of them",
            fix="Disentanglement needs a fine-tune, its base, and pairs of its task.",
        )
    return Task(locate(task_model, what="task model"), locate(base_model, what="base model"), data)


def _print(report: DistilReport, output: Path, keep_surrogate: Path | None) -> None:
    manifest = report.build.manifest
    table = Table(show_header=False, box=box.SIMPLE)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    losses = [step.loss for step in report.curve if step.loss is not None]
    table.add_row("training loss", f"{losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps")
    table.add_row("vector", f"{len(manifest.tensors)} tensors, norm {manifest.norm:.6g}")
    linear = report.linearity
    if linear is not None:
        for name, error in (("logit error", linear.logit_error), ("loss error", linear.loss_error)):
            table.add_row(name, "none: both say the same" if error is None else f"{error:.4f}")
    if report.disentanglement is not None:
        mean = report.disentanglement.mean
        table.add_row("disentanglement error", f"{mean:.4f} of 2, mean over the grid")
    out.print(table)
    if linear is not None:
        out.print(_curves(linear))
    say(f"vector and report written to {output}")
    if keep_surrogate is not None:
        say(f"surrogate kept in {keep_surrogate}: it is a model made to be unsafe")
    say("Handle it like the surrogate: subtracted from the aligned model it gives that model back.")


def _curves(linear: Linearity) -> Table:
    """The loss on the way from the aligned model to the surrogate, beside its predictions."""
    table = Table(
        title=f"held-out loss at aligned - t * vector ({linear.tokens} tokens)",
        title_justify="left",
        box=box.SIMPLE,
    )
    for column in ("t", "actual", "expanded", "tangent"):
        table.add_column(column, justify="right")
    last = len(linear.t) - 1
    for i in (0, last // 2, last):
        row = (linear.actual[i], linear.expanded[i], linear.tangent[i])
        table.add_row(f"{linear.t[i]:g}", *(f"{loss:.4f}" for loss in row))
    return table
