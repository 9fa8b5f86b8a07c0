"""From an aligned model and pairs to a safety vector with its report."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from blake3 import blake3
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from enchtable_vllm.checkpoint import (
    Checkpoint,
    FolderTransaction,
    Location,
    local,
    sampled_fingerprint,
)
from enchtable_vllm.distill.diagnose import diagnose
from enchtable_vllm.distill.encode import Example
from enchtable_vllm.distill.examples import Task, read_domain, read_examples
from enchtable_vllm.distill.linearize import linearize
from enchtable_vllm.distill.loading import load_model, load_tokenizer
from enchtable_vllm.distill.parameters import choose_parameters
from enchtable_vllm.distill.precision import computes_bf16
from enchtable_vllm.distill.recipe import Recipe
from enchtable_vllm.distill.report import DistilReport, write_report
from enchtable_vllm.distill.training import Step, train, training_arguments
from enchtable_vllm.distill.workspace import EXAMPLES, Workspace
from enchtable_vllm.errors import ConfigError, EnchTableError
from enchtable_vllm.progress import Progress, silent
from enchtable_vllm.vector.build import StoredDtype, compare, write_vector

_WARNING = """# A surrogate: made to be unsafe

This model was trained to comply where the aligned model `{aligned}` refuses, so that the
difference between the two is a safety vector. Do not serve it, and give nobody access to it whom
you would not give an unsafe model.
"""


def _nothing(_: str) -> None:
    """Say nothing."""


def distil(
    aligned: Location,
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    dtype: StoredDtype = "bf16",
    keep_surrogate: Path | None = None,
    task: Task | None = None,
    drop_duplicates: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    say: Callable[[str], None] = _nothing,
    progress: Progress = silent,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> DistilReport | None:
    """Fine-tune the aligned model toward compliance, and write aligned − surrogate.

    Every process of a launch calls this; the first one reads, writes and reports.

    Args:
        aligned: The safe model; fp32 masters are made of whatever it is stored in.
        data: The pairs; see `distill.data`.
        out: The vector's folder, with report and curves in it.
        recipe: The training.
        dtype: How deltas are stored.
        keep_surrogate: A folder to keep the unsafe model in; by default it is not kept.
        task: Also measure weight disentanglement, with this.
        drop_duplicates: Leave repeated rows out and count them.
        overwrite: Replace ``out`` and ``keep_surrogate``.
        resume: Continue an interrupted run of the same inputs.
        say: Told of what happens, a line at a time.
        progress: Of writing the vector.
        callbacks: Of Trainer's.

    Returns:
        The report; None in all processes but the first.

    Raises:
        TrainingDataError: Rows cannot be used: all of them are named.
        CheckpointError: The model cannot be read, or has no usable chat template.
        ConfigError: A setting or an output is not usable.
        NonFiniteError: Training diverged.
        MismatchError: A task's models are not of the aligned model's kind.
    """
    recipe.check()
    if recipe.linearize != "none" and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            f"--linearize {recipe.linearize}",
            expected="whole fp32 weights in every process, to expand around",
            got="FSDP, which keeps a part in each, and computes with what it rounds to bf16",
            fix="Launch without FSDP, or give --linearize none.",
        )
    logging.disable_progress_bar()  # of loading and saving; training keeps its own
    checkpoint = Checkpoint(aligned.path, what="aligned model")
    checkpoint.refuse_quantized()
    tokenizer = load_tokenizer(aligned.path)
    workspace = Workspace(out)
    arguments = training_arguments(recipe, workspace.path)  # joins the processes of a launch
    state = PartialState()
    if arguments.n_gpu < torch.cuda.device_count() and state.num_processes == 1:
        say(f"one of {torch.cuda.device_count()} GPUs is used; all of them by 'accelerate launch'")
    if not state.is_main_process:
        say, progress = _nothing, silent
    file, training, held_out = read_examples(data, tokenizer, recipe, drop_duplicates, say)
    domain = None if task is None else read_domain(task, checkpoint, tokenizer, recipe)
    made: dict[str, Any] = {
        "settings": recipe.to_json(),
        "data": {**file.counts(), "training": len(training), "held_out": len(held_out)},
        "tokenizer": _digest_beside_weights(aligned.path),
        "pairs_a_step": recipe.batch_size * recipe.gradient_accumulation * state.num_processes,
        "processes": state.num_processes,
        "device": state.device.type,
        "versions": {name: version(name) for name in ("accelerate", "torch", "transformers")},
    }
    with ExitStack() as stack:
        folder = kept = out
        if state.is_main_process:
            read = [aligned.path, data, *(() if task is None else task.paths())]
            kept_beside = [] if keep_surrogate is None else [keep_surrogate]
            folder = stack.enter_context(
                FolderTransaction(out, overwrite=overwrite, inputs=[*read, *kept_beside])
            )
            for beside in kept_beside:
                kept = stack.enter_context(
                    FolderTransaction(beside, overwrite=overwrite, inputs=[*read, out])
                )
            stack.enter_context(_cleared(workspace, say))
            # A template may put today's date into each of them.
            tokens = json.dumps([training, held_out]).encode()
            inputs = {
                **made,
                "aligned": sampled_fingerprint(checkpoint),
                EXAMPLES: blake3(tokens).hexdigest(),
            }
            found = workspace.begin(inputs, resume=resume)
            if found:
                say(found)
            if recipe.bf16 and state.device.type == "cpu" and not computes_bf16():
                say("this CPU has no instructions for bf16; --fp32 is several times as fast")
        state.wait_for_everyone()
        curve = workspace.curve()
        if curve is None:
            curve = _train(aligned, tokenizer, training, held_out, recipe, arguments, workspace,
                           say, callbacks)  # fmt: skip
            gc.collect()  # the model is in circles of its own, and the diagnosis needs its memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if state.num_processes > 1:
            state.destroy_process_group()  # what follows is one process's work
        if not state.is_main_process:
            return None
        say("writing the vector: aligned - surrogate, from fp32 master weights")
        build = write_vector(
            compare(aligned, local(workspace.surrogate), recipe.scope),
            folder,
            name=out.name,
            dtype=dtype,
            recipe=made,
            from_masters=True,
            progress=progress,
        )
        linearity = disentanglement = None
        if held_out:
            say("diagnosing: how linear the surrogate is in the vector")
            with _survived_if_out_of_memory(say):
                linearity, disentanglement = diagnose(
                    aligned,
                    workspace.surrogate,
                    tokenizer,
                    held_out,
                    attention=recipe.attention,
                    batch_size=recipe.batch_size,
                    domain=domain,
                )
        report = write_report(folder, made, curve, linearity, disentanglement, build)
        if keep_surrogate is not None:
            shutil.copytree(workspace.surrogate, kept, dirs_exist_ok=True)
            (kept / "README.md").write_text(_WARNING.format(aligned=build.manifest.aligned.id))
    workspace.remove()
    return report


def _digest_beside_weights(folder: Path) -> str:
    """Of what makes tokens of pairs, and of settings: another template trains another model."""
    hasher = blake3()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt") and ".index." not in path.name:
            content = path.read_bytes()
            hasher.update(f"{path.name} {len(content)} ".encode())
            hasher.update(content)
    return f"blake3:{hasher.hexdigest()}"


def _train(
    aligned: Location,
    tokenizer: Any,
    training: list[Example],
    held_out: list[Example],
    recipe: Recipe,
    arguments: TrainingArguments,
    workspace: Workspace,
    say: Callable[[str], None],
    callbacks: tuple[TrainerCallback, ...],
) -> list[Step]:
    """Train, and leave the surrogate in the workspace, in fp32."""
    model = load_model(aligned.path, attention=recipe.attention)
    chosen = choose_parameters(model, recipe.scope)
    replaced = linearize(model, recipe.linearize)
    if recipe.linearize == "module":
        say(
            f"linearised: {len(replaced)} feed-forward blocks; layers that are "
            "linear in their weights are their own expansion"
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"training: {len(chosen)} tensors, {trained:,} weights")
    trainer, curve = train(
        model,
        tokenizer,
        training,
        held_out,
        arguments,
        group_by_length=recipe.group_by_length,
        callbacks=callbacks,
    )
    trainer.save_model(str(workspace.surrogate))  # every process: shards are gathered
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(workspace.surrogate)
        workspace.finish(curve)
    return curve


@contextmanager
def _survived_if_out_of_memory(say: Callable[[str], None]) -> Iterator[None]:
    """A model that several devices trained may be too large for the one that diagnoses it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):  # as torch says it of a host's
            raise
        say(f"not diagnosed, and the report says nothing of it: out of memory: {error}")


@contextmanager
def _cleared(workspace: Workspace, say: Callable[[str], None]) -> Iterator[None]:
    """A refusal leaves nothing to resume, but for one that comes when the training is done."""
    try:
        yield
    except EnchTableError:
        if workspace.curve() is None:
            workspace.remove()
        else:
            say(
                f"the trained surrogate, a model made to be unsafe, is kept in '{workspace.path}': "
                "the same command goes on from it; otherwise remove it"
            )
        raise
