"""``enchtable plan``: measure interference, write ``merge_plan.json``."""

from __future__ import annotations

import json
import shlex
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from enchtable_vllm.checkpoint import FileTransaction, Location, locate
from enchtable_vllm.cli.options import DeviceOption, JobsOption, JsonOption, check_device
from enchtable_vllm.cli.output import errors, out, print_json, progress_bar, say, warn
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.merge.report import outcome_warnings
from enchtable_vllm.plan import (
    PLAN_FILE,
    MaskOptions,
    MergePlan,
    PlanOptions,
    VectorLocation,
    compute_plan,
    plan_digest,
)
from enchtable_vllm.plan.journal import Journal
from enchtable_vllm.plan.masks import MaskWriter
from enchtable_vllm.plan.summary import KindSummary, summarize
from enchtable_vllm.vector import SafetyVector, Scope


def plan(
    task_model: Annotated[str, typer.Option(help="The fine-tune: folder or Hub id\\[@revision].")],
    base_model: Annotated[str, typer.Option(help="What it was fine-tuned from.")],
    safety_vector: Annotated[str, typer.Option(help="The safety vector of that base.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"Default: {PLAN_FILE} in the task model's folder."),
    ] = None,
    beta: Annotated[
        float, typer.Option(help="β: the vector's norm, relative to the task's.")
    ] = 0.1,
    rank_fraction: Annotated[
        float, typer.Option(help="γ: the share of singular directions that is compared.")
    ] = 0.5,
    scope: Annotated[
        Scope | None, typer.Option(help="Default: the vector's own.", show_default=False)
    ] = None,
    device: DeviceOption = "cpu",
    allow_other_base: Annotated[
        bool,
        typer.Option(
            "--allow-other-base", help="Accept a vector that was built from another base model."
        ),
    ] = False,
    jobs: JobsOption = None,
    executor: Annotated[
        Literal["threads", "ray"],
        typer.Option(
            help="Where the linear algebra is done. ray: on the cluster of RAY_ADDRESS, or one "
            "that is started here; one task for each core, or with --device cuda for each GPU."
        ),
    ] = "threads",
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Do not continue where an interrupted run stopped.")
    ] = False,
    density: Annotated[
        float | None,
        typer.Option(help="Mask: keep this share of each delta, the largest.", show_default=False),
    ] = None,
    mask: Annotated[
        Literal["drop-sign-conflicts"] | None,
        typer.Option(help="Mask: leave out where vector and fine-tune disagree in sign."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan a merge: how much of the safety vector each matrix of a fine-tune can take.

    The plan is small and deterministic; with it, loading needs neither the base model nor
    linear algebra. a and b are stored, so another --beta costs nothing later. Interrupted, it
    continues when it is run again.
    """
    task = locate(task_model, what="task model")
    path = output or _default_output(task)
    if path.is_dir():
        path = path / PLAN_FILE
    options = PlanOptions(
        beta=beta,
        rank_fraction=rank_fraction,
        scope=scope,
        device=check_device(device),
        allow_other_base=allow_other_base,
        jobs=jobs,
        executor=executor,
        masks=MaskOptions(density, drop_sign_conflicts=mask is not None),
    )
    base = locate(base_model, what="base model")
    vector = SafetyVector.open(safety_vector, factors=True)
    where = _portable_location(vector.location, path)
    _refuse_input(path, (task.path, base.path, vector.location.path))
    with FileTransaction(path) as partial:  # before the work: can it be written?
        journal = Journal(
            path.with_name(f".{path.name}.journal"), resume=not no_resume, announce=_announce
        )
        masks = MaskWriter(path) if options.masks else nullcontext()
        with journal, masks as mask_writer, progress_bar("Planning") as progress:
            made = compute_plan(
                task,
                base,
                vector,
                options,
                vector_location=where,
                mask_writer=mask_writer,
                journal=journal,
                progress=progress,
            )
            text = made.to_json()
            partial.write_text(text, encoding="utf-8")
    attenuations = [x for tensor in made.merged.values() for x in tensor.attenuation]
    median = statistics.median(attenuations)
    for warning in outcome_warnings(median, made.retained_share, made.beta):
        warn(warning)
    kinds = summarize(made)
    if as_json:
        slowest = dict(sorted(journal.seconds.items(), key=lambda item: -item[1]))
        print_json(
            _to_json(made, kinds, path)
            | {"plan_digest": plan_digest(text.encode()), "seconds": slowest}
        )
    else:
        _print(made, kinds, path, task, vector.location)


def _announce(done: int, total: int) -> None:
    errors.print(f"resuming: {done} of {total} matrices were done", highlight=False)


def _default_output(task: Location) -> Path:
    if task.repo_id is not None:
        raise ConfigError(
            "--output",
            expected="a path, because the task model is a Hub repository",
            got="none",
            fix=f"Add '-o {PLAN_FILE}'.",
        )
    return task.path / PLAN_FILE


def _refuse_input(path: Path, inputs: tuple[Path, ...]) -> None:
    """An input's file is never replaced, unless it is an older plan."""
    inside = path.parent.resolve() in {folder.resolve() for folder in inputs}
    if inside and path.name != PLAN_FILE and path.exists():
        raise ConfigError(
            "--output",
            expected=f"a name that is not in use, or '{PLAN_FILE}'",
            got=f"'{path}', a file of an input",
            fix="Choose another name.",
        )


def _portable_location(vector: Location, plan_path: Path) -> VectorLocation | None:
    """Inside the plan's folder, or on the Hub, or None: a plan names no path of a machine."""
    folder = plan_path.parent.resolve()
    if vector.path.is_relative_to(folder) and vector.path != folder:
        return VectorLocation(path=vector.path.relative_to(folder).as_posix())
    if vector.repo_id is not None and vector.commit is not None:
        return VectorLocation(repo_id=vector.repo_id, commit=vector.commit)
    return None


def _to_json(made: MergePlan, kinds: list[KindSummary], path: Path) -> dict[str, object]:
    head = made.model_dump(mode="json", exclude={"tensors"}, exclude_none=True)
    kept: dict[str, str] = {n: t.reason or "" for n, t in made.tensors.items() if t.reason}
    return {
        **head,
        "output": str(path),
        "merged": len(made.merged),
        "kept": kept,
        "kinds": [kind.to_json() for kind in kinds],
    }


def _print(
    made: MergePlan, kinds: list[KindSummary], path: Path, task: Location, vector: Location
) -> None:
    table = Table(
        title="interference and attenuation: min/median/max",
        title_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("module", no_wrap=True)
    for column in ("count", "interference", "attenuation", "retained"):
        table.add_column(column, justify="right", no_wrap=True)
    for kind in kinds:
        table.add_row(
            escape(kind.kind),
            str(kind.matrices),
            "/".join(f"{x:.3f}" for x in kind.interference),
            "/".join(f"{x:.3f}" for x in kind.attenuation),
            f"{kind.retained_share:.3f}",
        )
    out.print(table)
    reasons: dict[str, int] = {}
    for tensor in made.tensors.values():
        if tensor.reason is not None:
            reasons[tensor.reason] = reasons.get(tensor.reason, 0) + 1
    for reason, count in sorted(reasons.items()):
        say(f"kept {count}: {reason}")
    for name, reason in made.unused.items():
        say(f"unused {name}: {reason}")
    say(
        f"merge {len(made.merged)} of {len(made.tensors)} tensors; beta {made.beta:g}, "
        f"norm scale {made.norm_scale:.6g}, expected retained share {made.retained_share:.3f}"
    )
    if made.masks is not None:
        say(f"masks keep {made.masks.kept_share:.1%}; they are in {path.parent / made.masks.path}")
    say(f"plan written to {path}")
    say("serve it:")
    say(f"  {_command(made, path, task, vector)}")


def _command(made: MergePlan, path: Path, task: Location, vector: Location) -> str:
    extra = {}
    if made.safety_vector.location is None:
        extra["safety_vector"] = str(vector)
    if path.resolve() != task.path / PLAN_FILE:
        extra["merge_plan"] = str(path)
    model = task.repo_id or str(task.path)
    command = f"vllm serve {shlex.quote(model)} --load-format enchtable"
    if extra:
        command += f" --model-loader-extra-config {shlex.quote(json.dumps(extra))}"
    return command
