"""``enchtable merge``: an ordinary checkpoint with the safety vector merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from enchtable_vllm.checkpoint import locate
from enchtable_vllm.cli.options import JsonOption, check_device
from enchtable_vllm.cli.output import print_json, progress_bar, say, warn
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.merge.report import Rounding
from enchtable_vllm.plan import open_masks, read_plan, resolve_plan
from enchtable_vllm.vector import SafetyVector, Scope


def merge(
    task_model: Annotated[str, typer.Option(help="The fine-tune: folder or Hub id\\[@revision].")],
    safety_vector: Annotated[str, typer.Option(help="The safety vector the plan was made for.")],
    plan: Annotated[Path, typer.Option(help="merge_plan.json, from 'enchtable plan'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The merged model's folder.")],
    beta: Annotated[
        float | None, typer.Option(help="Another β than the plan's.", show_default=False)
    ] = None,
    scope: Annotated[
        Scope | None, typer.Option(help="A part of the plan's scope.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to merge: cpu, cuda. Same bits.")] = "cpu",
    rounding: Annotated[
        Rounding, typer.Option(help="To bf16. Stochastic is experimental: see docs/method.md.")
    ] = "nearest",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge offline, for whoever does not run vLLM.

    Writes an ordinary checkpoint: sharding, config, tokenizer and templates stay as they are.
    Its weights are bit-identical to those that '--load-format enchtable' serves.
    """
    check_device(device)
    made, digest = read_plan(plan)
    resolved = resolve_plan(made, digest, beta=beta, scope=scope)
    masks = open_masks(made, plan)
    vector = SafetyVector.open(safety_vector)
    with progress_bar("Merging") as progress:
        report = merge_checkpoint(
            locate(task_model, what="task model"),
            vector,
            resolved,
            output,
            device=torch.device(device),
            masks=masks,
            rounding=rounding,
            overwrite=overwrite,
            progress=progress,
        )
    for warning in report.warnings():
        warn(warning)
    if as_json:
        print_json(report.to_json() | {"output": str(output)})
    else:
        say(report.line())
        for note in report.notes:
            say(note)
        say(f"merged model written to {output}")
