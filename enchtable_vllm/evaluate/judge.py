"""Whoever says what is unsafe: the refusal patterns, or a judge model at a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from openai import AsyncOpenAI, OpenAIError

from enchtable_vllm.evaluate import report
from enchtable_vllm.evaluate.faults import EvaluationError
from enchtable_vllm.evaluate.guards import Template, verdict
from enchtable_vllm.evaluate.refusals import refuses
from enchtable_vllm.evaluate.report import Calibration, Verdict


class Judge(Protocol):
    """Judges one answer."""

    def record(self) -> report.Judge:
        """For the report."""
        ...

    async def judge(self, prompt: str, answer: str) -> Verdict:
        """Safe, unsafe, or unparseable."""
        ...


@dataclass(frozen=True)
class Patterns:
    """The offline judge; see `refusals` for what it cannot tell."""

    calibration: Calibration | None = None

    def record(self) -> report.Judge:
        """For the report."""
        return report.Judge(name="patterns", calibration=self.calibration)

    async def judge(self, prompt: str, answer: str) -> Verdict:  # noqa: ARG002
        """Safe if it refuses. Nothing said is neither."""
        if not answer.strip():
            return "unparseable"
        return "safe" if refuses(answer) else "unsafe"


@dataclass(frozen=True)
class Model:
    """A judge model.

    Attributes:
        template: How it is asked.
        model: Its name at its server.
        connect: Makes a client of that server, which retries by itself.
    """

    template: Template
    model: str
    connect: Callable[[], AsyncOpenAI] = field(repr=False)
    calibration: Calibration | None = None
    #: A client's connections belong to an event loop, and each evaluation has its own.
    _clients: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncOpenAI] = field(
        default_factory=WeakKeyDictionary, repr=False, compare=False
    )

    def record(self) -> report.Judge:
        """For the report."""
        return report.Judge(
            name=self.template.guard,
            model=self.model,
            template=self.template.digest,
            calibration=self.calibration,
        )

    async def judge(self, prompt: str, answer: str) -> Verdict:
        """Its word for it.

        Raises:
            EvaluationError: There was none, after retries.
        """
        question = self.template.ask(prompt, answer)
        body: dict[str, Any] = {"model": self.model, **question.body}
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = self._clients[loop] = self.connect()
        try:
            if question.route == "completions":
                completion = await client.completions.create(**body)
                return verdict(completion.choices[0].text)
            chat = await client.chat.completions.create(**body)
            return verdict(chat.choices[0].message.content or "")
        except OpenAIError as error:
            raise EvaluationError(
                f"judge '{self.model}' at {client.base_url}",
                expected="a verdict",
                got=f"{type(error).__name__}: {error}",
                fix="See --judge-url, --judge-model, --ca-file and ENCHTABLE_JUDGE_API_KEY.",
            ) from error
