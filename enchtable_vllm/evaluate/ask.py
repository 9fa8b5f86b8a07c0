"""Asks a server all the prompts of some jobs, by inspect-ai, and keeps what it said.

Why inspect-ai and not lm-eval: a set of evaluations goes on where it stopped, prompt by prompt,
after an error, an interrupt or a kill; judges are ordinary asynchronous code beside the answer
that they judge; its logs are one file a set, with a viewer (``inspect view``); and it brings
neither torch nor data sets.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from inspect_ai import Task, eval_set
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as Asked
from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.model import GenerateConfig, ModelOutput, get_model
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver, system_message
from inspect_ai.util import concurrency
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from enchtable_vllm.evaluate.baselines import Around
from enchtable_vllm.evaluate.faults import EvaluationError
from enchtable_vllm.evaluate.files import private_folder
from enchtable_vllm.evaluate.jobs import Item, Job
from enchtable_vllm.evaluate.report import Sample
from enchtable_vllm.evaluate.safedecoding import SafeDecoding
from enchtable_vllm.fleet.client import trust
from enchtable_vllm.progress import Progress

#: Answers that a kill may cost, as a share: a log is written whole each time.
_LOST_SHARE = 0.01
#: How inspect says that what stands for an answer is the text of an error.
_NO_ANSWERS = ("model_length", "content_filter")
_OURS = re.compile(r"^[\w.]+\.EvaluationError: .*", re.M)
_ERROR = re.compile(r"^[\w.]+(?:Error|Exception|Timeout): .*", re.M)


@dataclass(frozen=True)
class Server:
    """Where to ask, and how hard.

    Attributes:
        url: Without ``/v1``.
        model: The name to ask for.
        api_key: None: none is needed.
        connections: Requests at once.
        retries: Of one request, besides the client's own quick two; each waits longer.
        timeout_seconds: Of one request.
        ca_file: Certificates to trust in place of the system's.
    """

    url: str
    model: str
    api_key: str | None = None
    connections: int = 8
    retries: int = 4
    timeout_seconds: float = 600.0
    ca_file: Path | None = None

    def http(self) -> DefaultAsyncHttpxClient:
        """For the OpenAI client."""
        return DefaultAsyncHttpxClient(verify=trust(self.ca_file))


@dataclass(frozen=True)
class Answers:
    """What became of one job's prompts.

    Attributes:
        samples: In the job's order.
        reasons: Why some of them failed.
    """

    samples: tuple[Sample, ...]
    reasons: tuple[str, ...]


def ask(
    server: Server,
    jobs: Sequence[Job],
    logs: Path,
    *,
    seed: int,
    around: Around | None = None,
    expert: str | None = None,
    progress: Progress,
) -> list[Answers]:
    """Ask, or go on asking.

    Args:
        server: Where.
        jobs: What; in logs of earlier runs of the same jobs, only what is missing is asked.
        logs: A folder for inspect's own logs, which hold every answer: for its owner alone.
        seed: For the server's sampling, which greedy decoding does not use.
        around: What is put around every prompt.
        expert: The model whose first tokens are mixed in: see `safedecoding`.
        progress: Told after every answer.

    Returns:
        One for each job, in their order.

    Raises:
        EvaluationError: Inspect itself failed.
        KeyboardInterrupt: It was interrupted; what was answered is kept.
    """
    private_folder(logs)
    total = sum(len(job.items) for job in jobs)
    count = 0

    def done(name: str) -> None:
        nonlocal count
        count += 1
        progress(name, count, total)

    names = _names(jobs)
    tasks = [
        _task(name, job, around, partial(done, name), _mixing(server, expert, job, seed))
        for name, job in zip(names, jobs, strict=True)
    ]
    model = get_model(
        f"openai-api/enchtable/{server.model}",
        base_url=f"{server.url}/v1",
        api_key=server.api_key or "none",
        memoize=False,
        client_timeout=server.timeout_seconds,
        http_client=server.http(),
        config=GenerateConfig(
            temperature=0.0,
            seed=seed,
            max_retries=server.retries,
            max_connections=server.connections,
        ),
    )
    with _quiet():
        try:
            _, found = eval_set(
                tasks,
                log_dir=str(logs),
                model=model,
                retry_attempts=0,
                retry_immediate=False,
                fail_on_error=True,
                continue_on_fail=True,  # one prompt without an answer does not cost the others
                max_tasks=len(tasks),
                max_samples=server.connections,
                log_format="json",  # readable while it grows, and after a kill
                log_buffer=max(1, int(total * _LOST_SHARE)),
                log_level="error",
                log_level_transcript="error",
                log_realtime=False,
                display="none",
                score_display=False,
                acp_server=False,
                ctl_server=False,
                log_dir_allow_dirty=True,
            )
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            raise EvaluationError(
                f"evaluation in '{logs}'",
                expected="inspect-ai to run it",
                got=f"{type(error).__name__}: {error}",
                fix="What was answered is kept: run the same command again, or choose another "
                "output.",
            ) from error
    # Inspect takes an interrupt for itself, and then returns fewer logs than there are tasks.
    if len(found) < len(tasks) or any(log.status == "cancelled" for log in found):
        raise KeyboardInterrupt
    by_name = {log.eval.task: log for log in found}
    return [_collect(by_name.get(name), job) for name, job in zip(names, jobs, strict=True)]


def _names(jobs: Sequence[Job]) -> list[str]:
    """Different ones, that are file names."""
    return [
        f"{place:02d}-{job.kind}-" + "".join(c if c.isalnum() else "-" for c in job.name)
        for place, job in enumerate(jobs)
    ]


def _task(
    name: str, job: Job, around: Around | None, done: Callable[[], None], answering: Solver
) -> Task:
    items = {item.id: item for item in job.items}
    dataset = MemoryDataset(
        [Asked(id=item.id, input=item.prompt, metadata={"category": item.category})
         for item in job.items],
        name=name,
    )  # fmt: skip
    steps: list[Solver] = [] if around is None else [system_message(around.system), _wrap(around)]
    return Task(
        name=name,
        dataset=dataset,
        solver=[*steps, answering],
        scorer=_grade(items.__getitem__, done),
        config=GenerateConfig(max_tokens=job.max_tokens),
    )


def _mixing(server: Server, expert: str | None, job: Job, seed: int) -> Solver:
    """How answers come about."""
    if expert is None:
        return generate()
    client = AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key=server.api_key or "none",
        max_retries=server.retries,
        timeout=server.timeout_seconds,
        http_client=server.http(),
    )
    mixing = SafeDecoding(client, server.model, expert)
    return _mix(mixing, job.max_tokens, seed, server.connections)


@solver
def _mix(mixing: SafeDecoding, max_tokens: int, seed: int, connections: int) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:  # noqa: ARG001
        turns = [{"role": turn.role, "content": turn.text} for turn in state.messages]
        # Over all jobs together: inspect knows of its own models' connections only.
        async with concurrency("safedecoding", connections):
            text = await mixing.answer(turns, max_tokens=max_tokens, seed=seed)
        state.output = ModelOutput.from_content(mixing.model, text)
        return state

    return solve


@solver
def _wrap(around: Around) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:  # noqa: ARG001
        state.user_prompt.text = around.wrap(state.user_prompt.text)
        return state

    return solve


@scorer(metrics=[mean()])
def _grade(item: Callable[[str], Item], done: Callable[[], None]) -> Scorer:
    # By functions: inspect writes all other arguments into its log, once for every sample.

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001
        if (stopped := state.output.stop_reason) in _NO_ANSWERS:
            raise EvaluationError(
                f"prompt '{state.sample_id}'",
                expected="an answer of the model",
                got=f"an error of the server or of what stands before it ({stopped})",
                fix="Its log says why.",
            )
        answer = state.output.completion
        grade = await item(str(state.sample_id)).grade(answer)
        done()
        return Score(
            value=1.0 if grade.verdict in ("unsafe", "correct") else 0.0,
            answer=grade.verdict,
            metadata={"refused": grade.refused},
        )

    return score


def _collect(header: EvalLog | None, job: Job) -> Answers:
    found: dict[str, EvalSample] = {}
    reasons: list[str] = []
    if header is not None:
        log = read_eval_log(header.location)
        found = {str(sample.id): sample for sample in log.samples or ()}
    samples = []
    for item in job.items:
        sample = found.get(item.id)
        score = next(iter((sample.scores or {}).values()), None) if sample is not None else None
        if sample is None or sample.error is not None or score is None or score.answer is None:
            if sample is not None and sample.error is not None:
                reasons.append(_reason(sample.error.traceback, sample.error.message))
            samples.append(Sample(id=item.id, verdict="failed", category=item.category))
            continue
        samples.append(
            Sample.model_validate(
                {
                    "id": item.id,
                    "verdict": score.answer,
                    "refused": (score.metadata or {}).get("refused"),
                    "category": item.category,
                }
            )
        )
    return Answers(tuple(samples), tuple(dict.fromkeys(reasons)))


def _reason(traceback: str, message: str) -> str:
    """What we say of it; else the first error of a chain, which the last one wraps."""
    found = _OURS.search(traceback) or _ERROR.search(traceback)
    return found[0] if found else message


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard output is the command's alone; whatever logs elsewhere warns and no more."""
    level = logging.getLogger("httpx").level
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger("httpx").setLevel(level)
