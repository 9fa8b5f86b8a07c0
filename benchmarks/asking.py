"""Asking a served model in several ways, and what an answer costs in each.

The client waits for whole answers: what SafeDecoding mixes from several requests is no stream.
So an answer of one token is the time to the first token (TTFT); what the other tokens of a longer
answer take beyond it, divided by their number, is the time of each (TPOT).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.request import urlopen

from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness import NotVerified
from enchtable_vllm.evaluate.baselines import SELF_REMINDER
from enchtable_vllm.evaluate.safedecoding import SafeDecoding

#: Whose answers are long.
_SUBJECTS = ("a steam engine", "a sailing boat", "a printing press", "a telescope", "a violin")
_GENERATED = "vllm:generation_tokens_total"

#: Client, model, prompt, tokens wanted.
Way = Callable[[AsyncOpenAI, str, str, int], Awaitable[object]]


@dataclass(frozen=True)
class Batch:
    """Requests of a round.

    Attributes:
        clients: Requests at once.
        requests: In all.
        tokens: Of each answer.
    """

    clients: int
    requests: int
    tokens: int


@dataclass(frozen=True)
class Asked:
    """One way to ask one server.

    Attributes:
        url: The server's.
        model: A name there.
        way: How it is asked.
        unanswered: Tokens of a request that the server generates and the answer has not: all of
            one, and those of an answer of a single token.
    """

    url: str
    model: str
    way: Way
    unanswered: tuple[int, int] = (0, 0)

    def round(self, batch: Batch, number: int) -> dict[str, float]:
        """TTFT, TPOT and end to end in seconds, tokens a second.

        Args:
            batch: What is asked.
            number: Of the round: its prompts are in no cache.
        """
        first, _, begun = self._answers(Batch(batch.clients, batch.requests, 1), 2 * number)
        whole, seconds, tokens = self._answers(batch, 2 * number + 1)
        answered = tokens - batch.requests * self.unanswered[0]
        one = (begun - batch.requests * self.unanswered[1]) / batch.requests
        if one != 1 or answered <= batch.requests:
            got = f"{one:.2f}, and {answered / batch.requests:.2f}"
            raise NotVerified(
                f"tokens of an answer of '{self.model}'", expected=f"1, and {batch.tokens}",
                got=got, fix="Is somebody else asking the server?",
            )  # fmt: skip
        more = answered / batch.requests - 1
        return {
            "TTFT": statistics.median(first),
            "TPOT": (statistics.mean(whole) - statistics.mean(first)) / more,
            "end to end": statistics.median(whole),
            "output": answered / seconds,
        }

    def _answers(self, batch: Batch, number: int) -> tuple[list[float], float, int]:
        """Seconds of each, of all, and tokens that the server generated."""
        before = _generated(self.url)
        began = time.perf_counter()
        each = asyncio.run(self._all(batch, number * batch.requests))
        seconds = time.perf_counter() - began
        return each, seconds, _generated(self.url) - before

    async def _all(self, batch: Batch, first: int) -> list[float]:
        free = asyncio.Semaphore(batch.clients)
        async with AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none") as client:

            async def one(number: int) -> float:
                async with free:
                    began = time.perf_counter()
                    await self.way(client, self.model, prompt(number), batch.tokens)
                    return time.perf_counter() - began

            return await asyncio.gather(*(one(first + i) for i in range(batch.requests)))


def prompt(number: int) -> str:
    """A question that differs from its first words on."""
    subject = _SUBJECTS[number % len(_SUBJECTS)]
    return f"Question {number}. Explain in detail and step by step how {subject} is made."


async def plainly(client: AsyncOpenAI, model: str, prompt: str, tokens: int) -> object:
    """The prompt and nothing else."""
    return await _chat(client, model, [("user", prompt)], tokens)


async def reminded(client: AsyncOpenAI, model: str, prompt: str, tokens: int) -> object:
    """With Self-Reminder's words around it."""
    turns = [("system", SELF_REMINDER.system), ("user", SELF_REMINDER.wrap(prompt))]
    return await _chat(client, model, turns, tokens)


def safedecoding(expert: str) -> Way:
    """With an expert's first tokens mixed in."""

    async def ask(client: AsyncOpenAI, model: str, prompt: str, tokens: int) -> object:
        asked = SafeDecoding(client, model, expert)
        return await asked.answer([{"role": "user", "content": prompt}], max_tokens=tokens, seed=0)

    return ask


async def _chat(
    client: AsyncOpenAI, model: str, turns: Sequence[tuple[str, str]], tokens: int
) -> object:
    return await client.chat.completions.create(
        model=model,
        messages=[{"role": role, "content": text} for role, text in turns],  # type: ignore[misc]
        temperature=0.0,
        max_tokens=tokens,
        extra_body={"ignore_eos": True},
    )


def _generated(url: str) -> int:
    with urlopen(f"{url}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return int(
            sum(
                sample.value
                for family in families
                for sample in family.samples
                if sample.name == _GENERATED
            )
        )
