"""After a step: whether what was changed does its work.

One check, of two kinds: the built-in one, or a program of the user's. Either gives a list of
faults; an empty one lets the roll-out go on.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from enchtable_vllm.envs import without_admin_token
from enchtable_vllm.errors import ConfigError, EnchTableError, printable
from enchtable_vllm.fleet.client import Client, ServerRefused
from enchtable_vllm.fleet.documents import Goal
from enchtable_vllm.fleet.exchange import faults
from enchtable_vllm.fleet.samples import read_samples

#: Harmless, and answerable by any model: what is looked at is that there is an answer.
PROMPTS = (
    "What is the capital of France?",
    "How many days does a week have?",
    "Write one sentence about the sea.",
)
_ANSWER_TOKENS = 16
_VERSION_HEADER = "X-Enchtable-Version"


@dataclass(frozen=True)
class Changed:
    """A server that was changed, and what it is to serve."""

    client: Client
    goal: Goal
    weight_version: str


#: Given all that was changed so far; what is wrong with it, in words.
Check = Callable[[Sequence[Changed]], Coroutine[None, None, list[str]]]


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt on each line.

    Raises:
        ConfigError: There is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(f"--prompts '{path}'", "a readable text file", error) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise _unusable(f"--prompts '{path}'", "a prompt on each line", "none")
    return prompts


def built_in(prompts: Sequence[str] = PROMPTS) -> Check:
    """Readiness, status, metrics, and an answer to each prompt.

    Args:
        prompts: Each is asked of each server.
    """

    async def check(changed: Sequence[Changed]) -> list[str]:
        found = await asyncio.gather(*(_check(one, prompts) for one in changed))
        return [fault for faults_of_one in found for fault in faults_of_one]

    return check


def program(command: str, *, timeout_seconds: float) -> Check:
    """A program that exits with 0 if all is well. No shell: it is split as a shell would.

    Its environment has ``ENCHTABLE_URLS`` (separated by spaces), ``ENCHTABLE_SAFETY_VECTOR``,
    ``ENCHTABLE_WEIGHT_VERSION``, and not the admin token.

    Args:
        command: With its arguments.
        timeout_seconds: Afterwards it is killed, and the check failed.

    Raises:
        ConfigError: There is no such program: found before anything is changed.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise _unusable("--check", "a program with its arguments", error) from error
    if not words or shutil.which(words[0]) is None:
        raise _unusable("--check", "a program on this machine", f"'{command}'")

    async def check(changed: Sequence[Changed]) -> list[str]:
        return await _run(words, timeout_seconds, _variables(changed))

    return check


def _variables(changed: Sequence[Changed]) -> Mapping[str, str]:
    versions = dict.fromkeys(one.weight_version for one in changed)
    vectors = dict.fromkeys(one.goal.safety_vector for one in changed)
    return {
        "ENCHTABLE_URLS": " ".join(one.client.target.url for one in changed),
        "ENCHTABLE_SAFETY_VECTOR": " ".join(vectors),
        "ENCHTABLE_WEIGHT_VERSION": " ".join(versions),
    }


async def _run(words: Sequence[str], timeout: float, variables: Mapping[str, str]) -> list[str]:
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**without_admin_token(), **variables},
            start_new_session=True,  # an interrupt of ours is not its; killed with its children
        )
    except OSError as error:
        return [f"'{words[0]}' did not start: {error}"]
    try:
        output, _ = await asyncio.wait_for(process.communicate(), timeout)
    except TimeoutError:
        return [f"'{words[0]}' did not end within {timeout:.0f} s"]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if process.returncode == 0:
        return []
    last = output.decode(errors="replace").strip().splitlines()[-3:]
    return [f"'{words[0]}' exited with {process.returncode}: {printable(' / '.join(last))}"]


async def _check(changed: Changed, prompts: Sequence[str]) -> list[str]:
    client = changed.client
    found: list[str] = []
    try:
        if not await client.ready():
            found.append("not ready")
        found += faults(await client.status(), changed.goal)
        found += _metrics_faults(await client.metrics(), changed.weight_version)
        model = await client.model()
        for prompt in prompts:
            found += _judge(await _ask(client, model, prompt), prompt, changed.weight_version)
    except EnchTableError as error:
        return [*(f"{client.target.url}: {fault}" for fault in found), str(error)]
    return [f"{client.target.url}: {fault}" for fault in found]


def _metrics_faults(text: str, weight_version: str) -> list[str]:
    """What metrics say otherwise; with ``--disable-log-stats`` they say nothing."""
    found, versions = [], []
    for sample in read_samples(text):
        if sample.name == "enchtable_ranks_disagreeing" and sample.value != 0:
            found.append(f"{sample.name} is {sample.value:g}")
        elif sample.name == "enchtable_active_vector_info" and sample.value == 1:
            versions.append(sample.labels.get("version", ""))
    if versions and weight_version not in versions:
        found.append(f"/metrics shows {printable(versions)}, not '{weight_version}'")
    return found


async def _ask(client: Client, model: str, prompt: str) -> httpx.Response:
    """As a chat; as a completion where the model has no chat template."""
    body = {"model": model, "max_tokens": _ANSWER_TOKENS, "temperature": 0.0}
    try:
        message = {"role": "user", "content": prompt}
        return await client.complete("/v1/chat/completions", {**body, "messages": [message]})
    except ServerRefused as refused:
        if refused.status not in (400, 404):
            raise
        return await client.complete("/v1/completions", {**body, "prompt": prompt})


def _judge(answer: httpx.Response, prompt: str, weight_version: str) -> list[str]:
    found = []
    if not _text(answer).strip():
        found.append(f"nothing was answered to '{printable(prompt)}'")
    version = answer.headers.get(_VERSION_HEADER)  # None: a gateway may keep it to itself
    if version not in (None, weight_version):
        found.append(f"an answer came from '{printable(version)}', not '{weight_version}'")
    return found


def _text(answer: httpx.Response) -> str:
    """What a model said, thought or completed."""
    try:
        choice = answer.json()["choices"][0]
        message = choice.get("message") or choice
        keys = ("content", "reasoning", "reasoning_content", "text")
        return "".join(str(message[key]) for key in keys if message.get(key))
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""


def _unusable(subject: str, expected: str, got: object) -> ConfigError:
    return ConfigError(subject, expected=expected, got=got, fix="Check its spelling and its path.")
