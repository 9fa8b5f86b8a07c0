"""``enchtable doctor``: what is wrong here, why, and what to do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from enchtable_vllm.cli.options import JsonOption
from enchtable_vllm.cli.output import out, print_json, say
from enchtable_vllm.doctor import Finding, Status
from enchtable_vllm.doctor.environment import check_environment
from enchtable_vllm.doctor.folders import check_cache, check_vector_root
from enchtable_vllm.doctor.signatures import check_signatures

_COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Check how this task model would be served: dry run.")
    ] = None,
    safety_vector: Annotated[str | None, typer.Option(help="With --model: its vector.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="With --model: to compute a plan from.")
    ] = None,
    merge_plan: Annotated[
        str | None, typer.Option(help="With --model: its plan; by default the model's own.")
    ] = None,
    vector_root: Annotated[
        Path | None,
        typer.Option(
            help="Check a folder of vectors and its permissions; with --model, how a server would "
            "take each from it."
        ),
    ] = None,
    require_signature: Annotated[
        str | None,
        typer.Option(help="Check this requirement: a public key, or the loader's JSON object."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check this environment, and what a server would do with a model.

    Nothing is loaded or downloaded: models are judged by headers and samples. Exit codes: 0
    healthy, 1 a problem was found, 2 wrong usage.
    """
    if model is None and (safety_vector or base_model or merge_plan):
        raise typer.BadParameter("these need --model", param_hint="--safety-vector and the like")
    if base_model and (merge_plan or not safety_vector):
        raise typer.BadParameter(
            "it needs --safety-vector, and excludes --merge-plan", param_hint="--base-model"
        )
    findings = [*check_environment(), check_cache()]
    if vector_root is not None:
        findings += check_vector_root(vector_root)
    if require_signature is not None:
        findings += check_signatures(require_signature, vector_root)
    if model is not None:
        root = None if vector_root is None else str(vector_root)
        findings += _dry_run(model, safety_vector, base_model, merge_plan, root, require_signature)
    counts = Counter(finding.status for finding in findings)
    if as_json:
        found = [finding.to_json() for finding in findings]
        print_json({"healthy": not counts["fail"], "findings": found})
    else:
        _print(findings)
        say(", ".join(f"{counts[status]} {status}" for status in _COLOURS if counts[status]))
    if counts["fail"]:
        raise typer.Exit(1)


def _dry_run(
    model: str,
    safety_vector: str | None,
    base_model: str | None,
    merge_plan: str | None,
    vector_root: str | None,
    require_signature: str | None,
) -> list[Finding]:
    try:
        from enchtable_vllm.doctor.dry_run import Question, dry_run
    except ImportError as error:  # no torch, or one that does not import: see its own finding
        return [Finding("dry run", "skip", "models cannot be read here", f"{error}")]
    return dry_run(
        Question(model, safety_vector, base_model, merge_plan, vector_root, require_signature)
    )


def _print(findings: list[Finding]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        lines = [escape(finding.found)]
        lines += [f"cause: {escape(finding.cause)}"] if finding.cause else []
        lines += [f"cure: {escape(finding.cure)}"] if finding.cure else []
        status = f"[{_COLOURS[finding.status]}]{finding.status}[/]"
        table.add_row(status, escape(finding.name), "\n".join(lines))
    out.print(table)
