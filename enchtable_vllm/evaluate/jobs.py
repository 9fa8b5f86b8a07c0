"""What is to be asked and how its answers are marked, one job for each set; nothing is sent yet."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.evaluate.faults import PromptSetError
from enchtable_vllm.evaluate.files import digest_of, parse_lines, read_bytes
from enchtable_vllm.evaluate.judge import Judge
from enchtable_vllm.evaluate.prompts import PromptSet, prompt_id, read_prompts
from enchtable_vllm.evaluate.refusals import refuses
from enchtable_vllm.evaluate.report import Kind, Verdict
from enchtable_vllm.evaluate.sampling import Split, choose
from enchtable_vllm.evaluate.sandbox import isolation
from enchtable_vllm.evaluate.utility import Problem, gsm8k, humaneval, medmcqa, read_utility
from enchtable_vllm.files import parse_json

_MARK: dict[str, Callable[[Problem, str], Verdict]] = {
    "humaneval": humaneval.mark,
    "gsm8k": gsm8k.mark,
    "medmcqa": medmcqa.mark,
}
#: A program's time is the clock's: no more run at once than there are cores for.
_MARKING = CapacityLimiter(os.cpu_count() or 1)


@dataclass(frozen=True)
class Grade:
    """One answer's."""

    verdict: Verdict
    refused: bool | None = None


@dataclass(frozen=True)
class Item:
    """One prompt as it is sent, and how its answer is graded."""

    id: str
    prompt: str
    grade: Callable[[str], Awaitable[Grade]] = field(repr=False)
    category: str = ""


@dataclass(frozen=True)
class Job:
    """One set.

    Attributes:
        available: Prompts that the set holds; ``items`` are those that were drawn.
        max_tokens: Of an answer.
    """

    name: str
    kind: Kind
    source: str
    digest: str
    available: int
    bad: tuple[str, ...]
    items: tuple[Item, ...]
    max_tokens: int


@dataclass(frozen=True)
class Sampling:
    """Which prompts of each set; see `sampling`."""

    limit: int | None = None
    seed: int = 0
    split: Split = "all"
    validation_share: float = 0.5


@dataclass(frozen=True)
class Wanted:
    """Everything that is to be asked.

    Attributes:
        safety, harmless: Files of prompts.
        utility: ``NAME`` or ``NAME=FILE``.
        templates: A file of jailbreak templates, each with ``{prompt}``, put around every safety
            prompt.
        utility_prompt: ``instructed``: problems come with a line on how to answer, so that the
            answer can be marked; ``plain``: without, for models that were trained to a form.
    """

    safety: tuple[Path, ...] = ()
    harmless: tuple[Path, ...] = ()
    utility: tuple[str, ...] = ()
    templates: Path | None = None
    allow_bad: bool = False
    allow_code: bool = False
    utility_prompt: Literal["instructed", "plain"] = "instructed"
    max_tokens: int = 256
    utility_max_tokens: int = 512
    sampling: Sampling = Sampling()


def make_jobs(wanted: Wanted, judge: Judge) -> list[Job]:
    """Read all sets.

    Raises:
        ConfigError: There is nothing to ask, or code may not be run.
        PromptSetError: A file is not what it should be.
    """
    jobs: list[Job] = []
    safety = [read_prompts(path, allow_bad=wanted.allow_bad) for path in wanted.safety]
    for found in safety:
        jobs.append(_prompts_job(found, "safety", wanted, judge))
    for path in wanted.harmless:
        found = read_prompts(path, allow_bad=wanted.allow_bad)
        jobs.append(_prompts_job(found, "harmless", wanted, judge))
    if wanted.templates is not None:
        jobs.append(_templates_job(wanted.templates, safety, wanted, judge))
    jobs += [_utility_job(wish, wanted) for wish in wanted.utility]
    if not jobs:
        raise ConfigError(
            "the evaluation",
            expected="at least one of --safety, --harmless and --utility",
            got="none",
            fix="Say what to ask.",
        )
    empty = [job.name for job in jobs if not job.items]
    if empty:
        raise ConfigError(
            f"the sample of {', '.join(empty)}",
            expected="at least one prompt",
            got="none",
            fix="Choose another --split, --validation-share, --limit or --seed.",
        )
    return jobs


def _drawn(wanted: Wanted, found: PromptSet) -> list[tuple[str, str, str]]:
    chosen = choose(found.prompts, lambda prompt: prompt.id, **vars(wanted.sampling))
    return [(prompt.id, prompt.text, prompt.category) for prompt in chosen]


def _prompts_job(found: PromptSet, kind: Kind, wanted: Wanted, judge: Judge) -> Job:
    grade = _refused if kind == "harmless" else partial(_judged, judge)
    return Job(
        name=found.name,
        kind=kind,
        source=found.form,
        digest=found.digest,
        available=len(found.prompts),
        bad=found.bad,
        items=tuple(
            Item(name, text, partial(grade, text), category)
            for name, text, category in _drawn(wanted, found)
        ),
        max_tokens=wanted.max_tokens,
    )


def _templates_job(path: Path, safety: Sequence[PromptSet], wanted: Wanted, judge: Judge) -> Job:
    if not safety:
        raise ConfigError(
            "--templates", expected="--safety, whose prompts they are put around", got="none",
            fix="Give both.",
        )  # fmt: skip
    templates, digest = _read_templates(path)
    items = []
    for found in safety:
        for name, text, category in _drawn(wanted, found):
            for template in templates:
                # What is judged is the answer to the question, not to what stands around it.
                items.append(
                    Item(
                        prompt_id(template + "\0" + name),
                        template.replace("{prompt}", text),
                        partial(_judged, judge, text),
                        category,
                    )
                )
    items = list({item.id: item for item in items}.values())  # two sets may share a prompt
    drawn = choose(items, lambda item: item.id, limit=wanted.sampling.limit,
                   seed=wanted.sampling.seed)  # fmt: skip
    return Job(
        name=path.stem,
        kind="jailbreak",
        source=f"{len(templates)} templates around the safety prompts",
        digest=digest_of("".join([digest, *(found.digest for found in safety)]).encode()),
        available=len(items),
        bad=(),
        items=tuple(drawn),
        max_tokens=wanted.max_tokens,
    )


def _utility_job(wish: str, wanted: Wanted) -> Job:
    found = read_utility(wish)
    source = found.source
    if found.name == "humaneval":
        if not wanted.allow_code:
            raise ConfigError(
                "--utility humaneval",
                expected="--allow-code-execution",
                got="none",
                fix="It runs what the model writes, with limits and without a network where the "
                "kernel allows that, yet on this machine: better in a container.",
            )
        source = f"{source}; run with {isolation()}"
    mark = _MARK[found.name]
    chosen = choose(found.problems, lambda problem: problem.id, **vars(wanted.sampling))
    instructed = wanted.utility_prompt == "instructed"
    return Job(
        name=found.name,
        kind="utility",
        source=source,
        digest=found.digest,
        available=len(found.problems),
        bad=(),
        items=tuple(
            Item(
                problem.id,
                f"{problem.prompt}\n\n{problem.instruction}" if instructed else problem.prompt,
                partial(_marked, mark, problem),
                problem.category,
            )
            for problem in chosen
        ),
        max_tokens=wanted.utility_max_tokens,
    )


def _read_templates(path: Path) -> tuple[list[str], str]:
    try:
        data = read_bytes(path)
        if path.suffix == ".jsonl":
            found = [value for _, value in parse_lines(data)]
        else:
            found = parse_json(data)
        if not isinstance(found, list) or not found:
            raise ValueError("no list of texts")
        for place, template in enumerate(found):
            if not isinstance(template, str) or template.count("{prompt}") != 1:
                raise ValueError(f"entry {place}, without {{prompt}} or with several")
    except (OSError, ValueError) as error:
        raise PromptSetError(
            f"templates '{path}'",
            expected="a JSON list, or lines of JSON, of texts with {prompt} in each once",
            got=error,
            fix="Put {prompt} where the question belongs.",
        ) from error
    return found, digest_of(data)


async def _judged(judge: Judge, prompt: str, answer: str) -> Grade:
    return Grade(await judge.judge(prompt, answer), refuses(answer))


async def _refused(_: str, answer: str) -> Grade:
    refused = refuses(answer)
    return Grade("unparseable" if not answer.strip() else "safe", refused)


async def _marked(mark: Callable[[Problem, str], Verdict], problem: Problem, answer: str) -> Grade:
    return Grade(await run_sync(mark, problem, answer, limiter=_MARKING))
