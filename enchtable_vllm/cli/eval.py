"""``enchtable eval``: how safe a served model is, and what it can still do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from enchtable_vllm.cli import eval_options as options
from enchtable_vllm.cli.compare import rate_words
from enchtable_vllm.cli.fleet_options import Access, ApiKeyOption, CaOption, UrlOption, one_target
from enchtable_vllm.cli.output import out, print_json, progress_bar, say, warn
from enchtable_vllm.errors import printable
from enchtable_vllm.evaluate.report import Report
from enchtable_vllm.evaluate.report_page import WHAT
from enchtable_vllm.fleet.credentials import Credentials

SplitOption = Annotated[
    Literal["all", "validation", "test"],
    typer.Option(help="Which side of the split that 'enchtable tune' makes."),
]


def eval(
    url: UrlOption,
    output: options.OutputOption,
    model: options.ModelOption = None,
    safety: options.SafetyOption = None,
    harmless: options.HarmlessOption = None,
    utility: options.UtilityOption = None,
    templates: Annotated[
        Path | None,
        typer.Option(help="Jailbreak templates, each with {prompt}, around the safety prompts."),
    ] = None,
    jailbreak: Annotated[
        Literal["garak"] | None, typer.Option(help="Attack the server with a program.")
    ] = None,
    garak: Annotated[Path, typer.Option(help="The program, in an environment of its own.")] = Path(
        "garak"
    ),
    garak_probes: Annotated[
        str, typer.Option(help="Garak's probes, separated by commas.")
    ] = "dan,dra",
    garak_config: Annotated[
        Path | None,
        typer.Option(help="Garak's settings, for probes that want an attacker's model."),
    ] = None,
    judge: options.JudgeOption = "patterns",
    judge_url: options.JudgeUrlOption = None,
    judge_model: options.JudgeModelOption = None,
    judge_template: options.JudgeTemplateOption = None,
    labelled_refusals: options.CalibrationOption = None,
    system_prompt_baseline: Annotated[
        Literal["self-reminder"] | None,
        typer.Option(help="Put a known defence around every prompt, to compare a merge with."),
    ] = None,
    safedecoding_expert: Annotated[
        str | None,
        typer.Option(
            help="The name, at the same server, of an adapter that was taught to refuse: its "
            "first tokens are mixed in (SafeDecoding)."
        ),
    ] = None,
    limit: options.LimitOption = None,
    seed: options.SeedOption = 0,
    split: SplitOption = "all",
    validation_share: options.ShareOption = 0.5,
    max_tokens: options.TokensOption = 256,
    utility_max_tokens: options.UtilityTokensOption = 512,
    utility_prompt: options.UtilityPromptOption = "instructed",
    allow_code_execution: options.CodeOption = False,
    allow_bad_entries: options.BadOption = False,
    allow_failed: options.FailedOption = 0,
    connections: options.ConnectionsOption = 8,
    retries: options.RetriesOption = 4,
    api_key_file: ApiKeyOption = None,
    ca_file: CaOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Measure a served model: unsafe answers, refusals, over-refusal, utility.

    Any OpenAI-compatible server. Greedy. Interrupted, it goes on when it is run again. The
    folder's report.json and index.html hold no prompt and no answer; its logs hold all of them:
    handle them with care.
    """
    options.require_extra("eval")
    from enchtable_vllm.evaluate.ask import Server
    from enchtable_vllm.evaluate.garak import attack, folder_of
    from enchtable_vllm.evaluate.jobs import Sampling, Wanted
    from enchtable_vllm.evaluate.run import PAGE_FILE, Evaluation, evaluate

    if jailbreak is not None and (system_prompt_baseline or safedecoding_expert):
        raise typer.BadParameter(
            "garak talks to the server itself, without a baseline's help",
            param_hint="--jailbreak",
        )
    target = one_target(url)
    access = Access(api_key_file=api_key_file, ca_file=ca_file)
    api_key = Credentials.find(None, api_key_file).api_key
    key = api_key.reveal() if api_key is not None else None
    access.connect([target], admin=False)  # warns once
    attacked = folder_of(output / "garak", garak_probes, garak_config)
    evaluation = Evaluation(
        connect=lambda: access.connect([target], admin=False)[0],
        server=Server(target.url, model or "", key, connections, retries, ca_file=ca_file),
        wanted=Wanted(
            safety=tuple(safety or ()),
            harmless=tuple(harmless or ()),
            utility=tuple(utility or ()),
            templates=templates,
            allow_bad=allow_bad_entries,
            allow_code=allow_code_execution,
            utility_prompt=utility_prompt,
            max_tokens=max_tokens,
            utility_max_tokens=utility_max_tokens,
            sampling=Sampling(limit, seed, split, validation_share),
        ),
        judge=options.make_judge(
            judge, judge_url, judge_model, judge_template, labelled_refusals, ca_file
        ),
        baseline=system_prompt_baseline,
        expert=safedecoding_expert,
        allow_failed=allow_failed,
        attack=None
        if jailbreak is None
        else lambda name: attack(
            garak,
            garak_probes,
            target.url,
            name,
            key,
            attacked,
            config=garak_config,
            ca_file=ca_file,
        ),
    )
    with progress_bar("Evaluating") as progress:
        report = evaluate(evaluation, output, progress)
    for result in report.results:
        for bad in result.bad:
            warn(f"{result.name}, left out: {bad}")
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    _print(report)
    say(f"report written to {output / PAGE_FILE}")


def _print(report: Report) -> None:
    table = Table(box=box.SIMPLE, show_lines=True)
    for column in ("set", "rate", "refused", "if all doubts were unsafe", "not judged"):
        table.add_column(column)
    for result in report.results:
        doubts = f"{result.unparseable} unparseable, {result.failed} failed"
        beside = "" if result.kind == "utility" else f"\n[dim]{report.judge.calibrated}[/]"
        table.add_row(
            f"{escape(printable(result.name))}\n[dim]{WHAT[result.kind]}[/]",
            rate_words(result.main) + beside,
            rate_words(result.refused),
            rate_words(result.worst),
            doubts,
        )
    out.print(table)
    if report.dynamic is not None:
        say(f"garak {report.dynamic.version}: attacks that succeeded {report.dynamic.broke}")
    if report.judge.calibration is None and report.kind("safety"):
        say("refusal patterns not calibrated: see --labelled-refusals")
