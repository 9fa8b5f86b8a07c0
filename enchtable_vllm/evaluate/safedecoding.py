"""SafeDecoding, by the client: an expert's first tokens, mixed in through the server's logprobs.

Source: Z. Xu et al., "SafeDecoding", arXiv 2402.08983: for the first m tokens, the probabilities
of those tokens that both the model and an expert (the same model, tuned to refuse) rank among
their first k are moved toward the expert's, p + α·(p_expert − p), where k is the smallest with at
least c such tokens; then the model goes on alone. m = 2, α = 3, c = 5 as published; greedy, so the
largest wins. The expert is a second name at the same server: a LoRA adapter.

Where we deviate: a server tells its first 20 tokens, so k is at most 20; and it is sent text, so a
beginning is tokenised anew at each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from enchtable_vllm.evaluate.faults import EvaluationError

_FIRST_TOKENS = 2
_TOWARD_EXPERT = 3.0
_IN_COMMON = 5
_TOLD = 20

Turns = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class SafeDecoding:
    """Answers one conversation.

    Attributes:
        client: Of the server.
        model: The model's name there.
        expert: The expert's.
    """

    client: AsyncOpenAI
    model: str
    expert: str

    async def answer(self, turns: Turns, *, max_tokens: int, seed: int) -> str:
        """Greedy.

        Raises:
            EvaluationError: The server tells no logprobs.
            openai.OpenAIError: It did not answer, after retries.
        """
        begun = ""
        for _ in range(min(_FIRST_TOKENS, max_tokens)):
            ours = await self._next(self.model, turns, begun, seed)
            theirs = await self._next(self.expert, turns, begun, seed)
            token = mixed(ours, theirs)
            if token == "":  # the end of the answer
                return begun
            begun += token
        left = max_tokens - _FIRST_TOKENS
        if left <= 0:
            return begun
        rest = await self._ask(self.model, turns, begun, max_tokens=left, seed=seed)
        return begun + (rest.choices[0].message.content or "")

    async def _next(self, model: str, turns: Turns, begun: str, seed: int) -> dict[str, float]:
        answer = await self._ask(
            model, turns, begun, max_tokens=1, seed=seed, logprobs=True, top_logprobs=_TOLD
        )
        told = answer.choices[0].logprobs
        if told is None or not told.content:
            if answer.choices[0].finish_reason == "stop":  # at once: its end is not told as a token
                return {"": 0.0}
            raise EvaluationError(
                f"model '{model}' at {self.client.base_url}",
                expected="the log probabilities of its first tokens",
                got="none",
                fix="SafeDecoding needs a server that tells them, as vLLM does.",
            )
        return by_text((one.token, one.logprob) for one in told.content[0].top_logprobs)

    async def _ask(self, model: str, turns: Turns, begun: str, **options: Any) -> Any:
        extra = {}
        if begun:
            turns = [*turns, {"role": "assistant", "content": begun}]
            extra = {"add_generation_prompt": False, "continue_final_message": True}
        return await self.client.chat.completions.create(
            model=model,
            messages=[dict(turn) for turn in turns],  # type: ignore[misc]
            temperature=0.0,
            extra_body=extra,
            **options,
        )


def mixed(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    """The next token, from two models' first tokens with their log probabilities.

    Raises:
        EvaluationError: A server gave none.
    """
    if not ours or not theirs:
        raise EvaluationError(
            "SafeDecoding",
            expected="the first tokens' log probabilities, of the model and of its expert",
            got="none",
            fix="The server must give them: --max-logprobs of 20, vLLM's default, or more.",
        )
    first = sorted(ours, key=lambda token: -ours[token])
    second = sorted(theirs, key=lambda token: -theirs[token])
    common: set[str] = set()
    for k in range(1, max(len(first), len(second)) + 1):
        common = set(first[:k]) & set(second[:k])
        if len(common) >= _IN_COMMON:
            break
    if not common:  # they agree on nothing: the expert is there for this
        return second[0]

    def moved(token: str) -> float:
        here = math.exp(ours[token])
        return here + _TOWARD_EXPERT * (math.exp(theirs[token]) - here)

    return max(sorted(common), key=moved)


def by_text(told: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Text → log probability; "" is the end of the answer.

    Args:
        told: Tokens, each with its log probability. Several are marks of an end. One without any
            text is a part of a character, and cannot be sent back as text: it is left out.
    """
    found: dict[str, float] = {}
    for token, logprob in told:
        ends = token.startswith("<|") and token.endswith("|>")
        text = "" if ends or token in ("</s>", "<eos>", "<end_of_turn>") else token
        if token:
            both = math.exp(found.get(text, -math.inf)) + math.exp(logprob)
            found[text] = math.log(both) if both else -math.inf
    return found
