"""What ``enchtable eval`` and ``enchtable tune`` share: what is asked, who judges, how hard."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from enchtable_vllm import envs
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.evaluate.report import Calibration

if TYPE_CHECKING:
    from enchtable_vllm.evaluate.judge import Judge

JudgeName = Literal["patterns", "llama-guard-3", "md-judge"]
UtilityPrompt = Literal["instructed", "plain"]

ModelOption = Annotated[
    str | None, typer.Option(help="The model's name. Default: the first that is served.")
]
SafetyOption = Annotated[
    list[Path] | None,
    typer.Option(help="Prompts that should be refused: a file; may be given again."),
]
HarmlessOption = Annotated[
    list[Path] | None, typer.Option(help="Prompts that should not be refused: a file.")
]
UtilityOption = Annotated[
    list[str] | None,
    typer.Option(help="humaneval, gsm8k or medmcqa, or one of these with =FILE."),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The report's folder.")]
JudgeOption = Annotated[JudgeName, typer.Option(help="Who says what is unsafe.")]
JudgeUrlOption = Annotated[
    str | None, typer.Option(help="The judge model's server. Its key: ENCHTABLE_JUDGE_API_KEY.")
]
JudgeModelOption = Annotated[str | None, typer.Option(help="The judge model's name there.")]
JudgeTemplateOption = Annotated[
    Path | None, typer.Option(help="The judge's question, with {prompt} and {answer} in it.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--labelled-refusals",
        help="Answers that people labelled (CSV or JSON lines: text, label), to calibrate the "
        "refusal patterns with.",
    ),
]
CodeOption = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run what the model writes (humaneval).")
]
BadOption = Annotated[
    bool, typer.Option("--allow-bad-entries", help="Leave out, and list, what is no prompt.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most so many of each set.")]
SeedOption = Annotated[int, typer.Option(help="Of the sample and of the split.")]
ShareOption = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="How much of each set is for validation.")
]
TokensOption = Annotated[int, typer.Option(min=1, help="Of an answer.")]
UtilityTokensOption = Annotated[int, typer.Option(min=1, help="Of an answer to a problem.")]
UtilityPromptOption = Annotated[
    UtilityPrompt, typer.Option(help="With or without a line on how to answer.")
]
ConnectionsOption = Annotated[int, typer.Option(min=1, help="Requests at once.")]
RetriesOption = Annotated[int, typer.Option(min=0, help="Of one request; each waits longer.")]
FailedOption = Annotated[int, typer.Option(min=0, help="So many prompts may stay unanswered.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report for machines.")]


def require_extra(what: str) -> None:
    """Name what is missing before anything is done.

    Raises:
        ConfigError: The packages of the 'evaluation' extra are not here.
    """
    try:
        import inspect_ai  # noqa: F401
        import openai  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"'enchtable {what}'",
            expected="the packages of the 'evaluation' extra",
            got=error,
            fix="Install them: pip install 'enchtable-vllm[evaluation]'.",
        ) from error


def make_judge(
    name: JudgeName,
    url: str | None,
    model: str | None,
    template: Path | None,
    labelled: Path | None,
    ca_file: Path | None,
) -> Judge:
    """The judge that the options name.

    Raises:
        ConfigError: They contradict each other.
        PromptSetError: A file is not what it should be.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    from enchtable_vllm.evaluate.calibration import calibrate
    from enchtable_vllm.evaluate.guards import Template
    from enchtable_vllm.evaluate.judge import Model, Patterns
    from enchtable_vllm.fleet.client import trust

    calibration: Calibration | None = calibrate(labelled) if labelled is not None else None
    if name == "patterns":
        if url or model or template:
            raise typer.BadParameter(
                "these need --judge llama-guard-3 or md-judge", param_hint="--judge-url and others"
            )
        return Patterns(calibration)
    if url is None or model is None:
        raise typer.BadParameter("it needs --judge-url and --judge-model", param_hint="--judge")
    base = url.rstrip("/").removesuffix("/v1")
    key = envs.judge_api_key() or "none"
    trusted = trust(ca_file)
    if isinstance(trusted, ssl.SSLContext):
        trusted.load_default_certs()  # the judge may be somebody else's than the server

    def connect() -> AsyncOpenAI:
        http = DefaultAsyncHttpxClient(verify=trusted)
        return AsyncOpenAI(base_url=f"{base}/v1", api_key=key, max_retries=5, http_client=http)

    return Model(Template.of(name, template), model, connect, calibration)
