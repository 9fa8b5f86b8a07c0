"""``enchtable tune``: which β, by measuring."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from enchtable_vllm.cli import eval_options as options
from enchtable_vllm.cli.compare import rate_words
from enchtable_vllm.cli.fleet_options import (
    Access,
    AdminTokenOption,
    ApiKeyOption,
    CaOption,
    PatienceOption,
    RequestsOption,
    TimeoutOption,
    UrlOption,
    one_target,
    seconds,
)
from enchtable_vllm.cli.output import errors, out, print_json, progress_bar, say, warn
from enchtable_vllm.errors import ConfigError, printable
from enchtable_vllm.evaluate.curve import write_png
from enchtable_vllm.evaluate.tune_choice import Budget
from enchtable_vllm.evaluate.tune_journal import Sweep, Tuning
from enchtable_vllm.evaluate.tune_page import doubts, judged, verdict
from enchtable_vllm.fleet.credentials import Credentials
from enchtable_vllm.fleet.exchange import How

CURVE_FILE = "curve.png"


def tune(
    url: UrlOption,
    safety_vector: Annotated[
        str, typer.Option(help="Its name in the server's vector root, or org/name@COMMIT.")
    ],
    output: options.OutputOption,
    safety: Annotated[
        list[Path], typer.Option(help="Prompts that should be refused: a file; again for more.")
    ],
    utility: Annotated[
        list[str], typer.Option(help="humaneval, gsm8k or medmcqa, or one of these with =FILE.")
    ],
    betas: Annotated[
        str | None, typer.Option(help="The β to measure: 0.1,0.3,1.", show_default=False)
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Look for a β: a grid, then around the best.")
    ] = False,
    search_range: Annotated[
        str, typer.Option("--range", help="With --search: the smallest and the largest β.")
    ] = "0.05,3",
    steps: Annotated[int, typer.Option(min=1, help="With --search: how many β.")] = 8,
    harmless: options.HarmlessOption = None,
    utility_budget: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="How much utility may be lost: 0.01 is a point.")
    ] = 0.01,
    over_refusal_budget: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="How much over-refusal may rise. Default: any."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the server on the proposed β.")
    ] = False,
    model: options.ModelOption = None,
    judge: options.JudgeOption = "patterns",
    judge_url: options.JudgeUrlOption = None,
    judge_model: options.JudgeModelOption = None,
    judge_template: options.JudgeTemplateOption = None,
    labelled_refusals: options.CalibrationOption = None,
    limit: options.LimitOption = None,
    seed: options.SeedOption = 0,
    validation_share: options.ShareOption = 0.5,
    max_tokens: options.TokensOption = 256,
    utility_max_tokens: options.UtilityTokensOption = 512,
    utility_prompt: options.UtilityPromptOption = "instructed",
    allow_code_execution: options.CodeOption = False,
    allow_bad_entries: options.BadOption = False,
    allow_failed: options.FailedOption = 0,
    connections: options.ConnectionsOption = 8,
    retries: options.RetriesOption = 4,
    requests: RequestsOption = "wait",
    timeout: TimeoutOption = "10m",
    patience: PatienceOption = "60s",
    admin_token_file: AdminTokenOption = None,
    api_key_file: ApiKeyOption = None,
    ca_file: CaOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Find a β: sweep it on one live server, and draw safety against utility.

    Each β is swapped in and evaluated on the validation split; so is the task model without a
    vector, which the utility budget counts from. Interrupted, it goes on when it is run again.
    The server ends on the vector and β that it started with. Do not send it other work meanwhile:
    it would be answered by whatever is being measured.
    """
    options.require_extra("tune")
    from enchtable_vllm.evaluate.ask import Server
    from enchtable_vllm.evaluate.jobs import Sampling, Wanted
    from enchtable_vllm.evaluate.run import Evaluation, ask_judge, evaluate, what_is_asked
    from enchtable_vllm.evaluate.tune import PAGE_FILE, Tune
    from enchtable_vllm.evaluate.tune import tune as sweep

    if (betas is None) == (not search):
        raise typer.BadParameter("give one of the two", param_hint="--betas, --search")
    if safety_vector.startswith("@"):
        raise typer.BadParameter(
            "the vector itself: '@current' has a β of its own, '@none' has none",
            param_hint="--safety-vector",
        )
    if over_refusal_budget is not None and not harmless:
        raise typer.BadParameter("it needs --harmless", param_hint="--over-refusal-budget")
    target = one_target(url)
    access = Access(admin_token_file, api_key_file, ca_file)
    access.connect([target], admin=True)  # warns once, and wants the token before any work
    api_key = Credentials.find(admin_token_file, api_key_file).api_key
    evaluation = Evaluation(
        connect=lambda: Access(api_key_file=api_key_file, ca_file=ca_file).connect(
            [target], admin=False
        )[0],
        server=Server(
            target.url,
            model or "",
            api_key.reveal() if api_key is not None else None,
            connections,
            retries,
            ca_file=ca_file,
        ),
        wanted=Wanted(
            safety=tuple(safety),
            harmless=tuple(harmless or ()),
            utility=tuple(utility),
            allow_bad=allow_bad_entries,
            allow_code=allow_code_execution,
            utility_prompt=utility_prompt,
            max_tokens=max_tokens,
            utility_max_tokens=utility_max_tokens,
            sampling=Sampling(limit, seed, "validation", validation_share),
        ),
        judge=options.make_judge(
            judge, judge_url, judge_model, judge_template, labelled_refusals, ca_file
        ),
        allow_failed=allow_failed,
        swapping=True,
    )
    bounds = _numbers(search_range, "--range")
    if search and (len(bounds) != 2 or bounds[0] >= bounds[1]):
        raise typer.BadParameter("a smaller and a larger one", param_hint="--range")
    what = what_is_asked(evaluation)
    ask_judge(evaluation)
    with progress_bar("Evaluating") as progress:
        tuning = sweep(
            Tune(
                connect=lambda: access.connect([target], admin=True)[0],
                evaluate=lambda folder: evaluate(evaluation, folder, progress),
                sweep=Sweep(
                    url=target.url,
                    safety_vector=safety_vector,
                    betas=() if betas is None else _numbers(betas, "--betas"),
                    search=(bounds[0], bounds[1], steps) if search else None,
                    what=what,
                ),
                budget=Budget(utility_budget, over_refusal_budget),
                keep=keep,
                how=How(
                    requests,
                    timeout_seconds=seconds(timeout, "--timeout"),
                    patience_seconds=seconds(patience, "--patience"),
                ),
                announce=lambda text: errors.print(printable(text), markup=False, highlight=False),
            ),
            output,
        )
    _picture(tuning, output)
    if as_json:
        print_json(tuning.model_dump(mode="json"))
        return
    _print(tuning)
    say(f"page written to {output / PAGE_FILE}")


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError as error:
        raise typer.BadParameter("numbers with commas between", param_hint=option) from error
    if not all(math.isfinite(beta) and beta > 0 for beta in found):
        raise typer.BadParameter("each must be positive and finite", param_hint=option)
    return found


def _picture(tuning: Tuning, output: Path) -> None:
    try:
        write_png(tuning.steps, tuning.proposed, output / CURVE_FILE)
    except ConfigError as error:  # the page has the curve all the same
        warn(str(error))


def _print(tuning: Tuning) -> None:
    table = Table(box=box.SIMPLE)
    for column in ("", "unsafe", "utility", "over-refusal"):
        table.add_column(column)
    for step in sorted(tuning.steps, key=lambda step: step.beta or 0.0):
        unsafe, utility, refused = map(rate_words, (step.unsafe, step.utility, step.over_refusal))
        doubtful = f"\n[dim]{words}[/]" if (words := doubts(step)) else ""
        table.add_row(step.name, unsafe + doubtful, utility, refused)
    out.print(table)
    if tuning.judge is not None:
        say(judged(tuning.judge))
    say(verdict(tuning))
