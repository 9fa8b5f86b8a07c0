"""One evaluation, from a look at the server to its report.

The output folder says in ``request.json`` what it is the evaluation of. The same command goes on
where it stopped; another one is refused, and so is going on against a server that has come to
serve something else, or did meanwhile, or, where it does not say what it serves, is another: an
average over two models would be a measurement of neither.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from enchtable_vllm.errors import ConfigError, EnchTableError
from enchtable_vllm.evaluate import report
from enchtable_vllm.evaluate.ask import Server, ask
from enchtable_vllm.evaluate.baselines import BASELINES, Baseline
from enchtable_vllm.evaluate.faults import EvaluationError
from enchtable_vllm.evaluate.files import digest_of, only_writer, write_whole
from enchtable_vllm.evaluate.jobs import Job, Wanted, make_jobs
from enchtable_vllm.evaluate.judge import Judge
from enchtable_vllm.evaluate.report import (
    REPORT_FILE,
    Dynamic,
    Kind,
    Report,
    Result,
    ServedNow,
    Settings,
)
from enchtable_vllm.evaluate.report_page import report_page
from enchtable_vllm.evaluate.target import model_name, served_now
from enchtable_vllm.fleet.client import Client, ServerRefused, Unreachable
from enchtable_vllm.progress import Progress

REQUEST_FILE = "request.json"
PAGE_FILE = "index.html"
#: For a judge, to see whether it is there.
_HARMLESS = ("What is the capital of France?", "Paris.")


class _Set(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    name: str
    digest: str
    prompts: str


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    model: str
    served: ServedNow | None
    #: The server's count of swaps; None where it does not count, or where we are who swaps.
    epoch: int | None
    #: The server, where it does not say what it serves.
    url: str | None
    judge: report.Judge
    settings: Settings
    sets: tuple[_Set, ...]
    spoiled: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What to do.

    Attributes:
        connect: Makes a client of the server; it is used once.
        server: Where prompts go; its model is "" for the first that is served.
        wanted: What to ask.
        judge: Who marks safety.
        baseline: What is put around every prompt.
        expert: The model whose first tokens are mixed in.
        allow_failed: So many prompts may stay without an answer.
        attack: Called with the model's name, to attack the server by other means.
        swapping: The caller swaps between an interruption and going on, so that the server's count
            of swaps is no sign of somebody else's.
    """

    connect: Callable[[], Client]
    server: Server
    wanted: Wanted
    judge: Judge
    baseline: Baseline | None = None
    expert: str | None = None
    allow_failed: int = 0
    attack: Callable[[str], Dynamic] | None = None
    swapping: bool = False


def evaluate(evaluation: Evaluation, output: Path, progress: Progress) -> Report:
    """Evaluate, or go on evaluating.

    Args:
        evaluation: What to do.
        output: The report's folder.
        progress: Told after every answer.

    Returns:
        The report, which is then in the folder.

    Raises:
        ConfigError: The folder is another evaluation's, or in use.
        PromptSetError: A set is not what it should be.
        EvaluationError: More prompts stayed without an answer than may, or the server came to
            serve something else.
        ServerRefused, Unreachable: The server did not say what it serves.
    """
    with only_writer(output, "evaluating"):
        return _evaluate(evaluation, output, progress)


def ask_judge(evaluation: Evaluation) -> None:
    """Have the judge judge something harmless, before there is anything to lose.

    Raises:
        EvaluationError: It does not.
    """
    if evaluation.wanted.safety:
        asyncio.run(evaluation.judge.judge(*_HARMLESS))


def what_is_asked(evaluation: Evaluation) -> str:
    """A digest of all that decides what is asked and how it is marked, whoever is asked.

    Raises:
        ConfigError, PromptSetError: There is something wrong with it.
    """
    jobs = make_jobs(evaluation.wanted, evaluation.judge)
    model = evaluation.server.model
    request = _request(evaluation, jobs, model, None, None).model_copy(update={"url": None})
    return digest_of(request.model_dump_json().encode())


def _evaluate(evaluation: Evaluation, output: Path, progress: Progress) -> Report:
    wanted = evaluation.wanted
    jobs = make_jobs(wanted, evaluation.judge)  # before the first word to a server
    ask_judge(evaluation)
    model, served, epoch = asyncio.run(_look(evaluation))
    request = _request(evaluation, jobs, model, served, epoch)
    _take_over(output / REQUEST_FILE, request)
    around = BASELINES[evaluation.baseline] if evaluation.baseline else None
    try:
        answers = ask(
            replace(evaluation.server, model=model),
            jobs,
            output / "logs",
            seed=wanted.sampling.seed,
            around=around,
            expert=evaluation.expert,
            progress=progress,
        )
    except BaseException:  # what was answered until then is kept, and must be of one model, too
        with suppress(EnchTableError):
            _refuse_changed(evaluation, output, request, served, epoch)
        raise
    failed = sum(sample.verdict == "failed" for one in answers for sample in one.samples)
    if failed > evaluation.allow_failed:
        with suppress(ServerRefused, Unreachable):  # then that is why
            _refuse_changed(evaluation, output, request, served, epoch)
        reasons = list(dict.fromkeys(reason for one in answers for reason in one.reasons))
        raise EvaluationError(
            f"evaluation of '{model}' at {evaluation.server.url}",
            expected=f"an answer to every prompt but {evaluation.allow_failed}",
            got=f"{failed} without, the first because: {reasons[0] if reasons else 'not known'}",
            fix="The others are kept: run the same command again, or let some fail with "
            "--allow-failed.",
        )
    dynamic = evaluation.attack(model) if evaluation.attack else None
    _refuse_changed(evaluation, output, request, served, epoch)
    results = tuple(
        Result.of(
            job.name,
            job.kind,
            source=job.source,
            digest=job.digest,
            available=job.available,
            bad=job.bad,
            samples=one.samples,
        )
        for job, one in zip(jobs, answers, strict=True)
    )
    made = Report(
        model=model,
        served=served,
        judge=request.judge,
        settings=request.settings,
        results=results,
        dynamic=dynamic,
        versions={
            **{name: version(name) for name in ("enchtable-vllm", "inspect-ai", "openai")},
            "python": platform.python_version(),
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_whole(output / PAGE_FILE, report_page(made))
    write_whole(output / REPORT_FILE, made.to_json())
    return made


def _refuse_changed(
    evaluation: Evaluation,
    output: Path,
    request: _Request,
    served: ServedNow | None,
    epoch: int | None,
) -> None:
    """Spoil the folder if the server serves something else by now."""
    _, after, epoch_after = asyncio.run(_look(evaluation))
    if (after, epoch_after) == (served, epoch):
        return
    changed = f"{_words(served, epoch)} became {_words(after, epoch_after)}"
    spoiled = request.model_copy(update={"spoiled": changed})
    write_whole(output / REQUEST_FILE, spoiled.model_dump_json(indent=1) + "\n")
    raise EvaluationError(
        f"server {evaluation.server.url}",
        expected="the same weights from the first prompt to the last",
        got=changed,
        fix="Nobody may swap meanwhile. Evaluate again, with another output.",
    )


async def _look(evaluation: Evaluation) -> tuple[str, ServedNow | None, int | None]:
    async with evaluation.connect() as client:
        served, epoch = await served_now(client)
        return await model_name(client, evaluation.server.model or None), served, epoch


def _request(
    evaluation: Evaluation,
    jobs: list[Job],
    model: str,
    served: ServedNow | None,
    epoch: int | None,
) -> _Request:
    wanted, sampling = evaluation.wanted, evaluation.wanted.sampling
    return _Request(
        model=model,
        served=served,
        epoch=None if evaluation.swapping else epoch,
        url=evaluation.server.url if served is None else None,
        judge=evaluation.judge.record(),
        settings=Settings(
            max_tokens=wanted.max_tokens,
            utility_max_tokens=wanted.utility_max_tokens,
            limit=sampling.limit,
            seed=sampling.seed,
            split=sampling.split,
            validation_share=sampling.validation_share,
            system_prompt_baseline=evaluation.baseline,
            safedecoding_expert=evaluation.expert,
            utility_prompt=wanted.utility_prompt,
        ),
        sets=tuple(
            _Set(
                kind=job.kind,
                name=job.name,
                digest=job.digest,
                prompts=digest_of("\n".join(item.id for item in job.items).encode()),
            )
            for job in jobs
        ),
    )


def _take_over(path: Path, request: _Request) -> None:
    """Go on with the same request, refuse another's folder, begin in a new one."""
    if not path.exists():
        write_whole(path, request.model_dump_json(indent=1) + "\n")
        return
    try:
        found = _Request.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _refused(path, "something else") from error
    if found.spoiled is not None:
        raise _refused(path, f"one whose server changed meanwhile: {found.spoiled}")
    differs = [name for name in type(found).model_fields if
               getattr(found, name) != getattr(request, name)]  # fmt: skip
    if differs:
        raise _refused(path, f"one with another {', '.join(differs)}")


def _refused(path: Path, got: str) -> EnchTableError:
    return ConfigError(
        f"output '{path.parent}'",
        expected="a new folder, or one with this very evaluation to go on with",
        got=got,
        fix="Choose another output, or remove that one.",
    )


def _words(served: ServedNow | None, epoch: int | None) -> str:
    return "no word of it" if served is None else f"{served.weight_version} at epoch {epoch}"
