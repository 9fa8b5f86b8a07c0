"""Before the first side effect: whether every server can do what it will be asked to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from enchtable_vllm.errors import EnchTableError, printable
from enchtable_vllm.fleet.client import Client
from enchtable_vllm.fleet.documents import NO_VECTOR, Goal, Served, Status, TaskModel

#: Questions asked of servers at the same time; a dry run reads a vector from shared storage.
_AT_ONCE = 8


@dataclass(frozen=True)
class Wish:
    """What every target is to serve.

    Attributes:
        safety_vector: As the server's ``safety_vector`` key.
        beta: Another β than the plan's.
        dry_run: Let every server stage and check it first.
        allow_mixed_models: Targets may serve different task models.
        timeout_seconds: For staging.
    """

    safety_vector: str
    beta: float | None = None
    dry_run: bool = True
    allow_mixed_models: bool = False
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class Verified:
    """A server that can.

    Attributes:
        status: Of now.
        goal: What it will serve.
    """

    status: Status
    goal: Goal

    @property
    def served(self) -> Served:
        """What it serves now."""
        return Served.of(self.status)

    @property
    def there_already(self) -> bool:
        """Whether the very vector, plan and β are served, and what restarts would serve them."""
        exactly = self.goal.known and self.goal.met_by(self.served)
        return exactly and self.status.as_desired is not False


@dataclass(frozen=True)
class Refusal:
    """Why a server, or the fleet, cannot.

    Attributes:
        url: None: it is about several.
        reason: In words.
    """

    url: str | None
    reason: str


async def verify(
    clients: Sequence[Client], wish: Wish
) -> tuple[dict[str, Verified], list[Refusal]]:
    """Ask every server, and compare them with one another. Nothing is changed.

    Returns:
        By URL those that can; and why others, or all of them together, cannot.
    """
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(client: Client) -> Verified | Refusal:
        async with gate:
            try:
                return await _verify(client, wish)
            except EnchTableError as error:
                return Refusal(client.target.url, str(error))

    answers = await asyncio.gather(*map(one, clients))
    verified = {
        client.target.url: answer
        for client, answer in zip(clients, answers, strict=True)
        if isinstance(answer, Verified)
    }
    refusals = [answer for answer in answers if isinstance(answer, Refusal)]
    return verified, refusals + _disagreements(verified, wish)


async def _verify(client: Client, wish: Wish) -> Verified | Refusal:
    status = await client.status()
    if status.state != "serving":
        return Refusal(client.target.url, f"it is '{status.state}': {printable(status.reason)}")
    if status.disagreeing:
        return Refusal(client.target.url, f"{status.disagreeing} of its ranks disagree already")
    if status.not_swappable:
        return Refusal(client.target.url, f"not swappable: {printable(status.not_swappable)}")
    goal = await _listed(client, wish, status.task_model)
    if isinstance(goal, Refusal):
        return goal
    if wish.dry_run:
        tried = await client.swap(
            wish.safety_vector,
            beta=wish.beta,
            dry_run=True,
            expected_epoch=status.epoch,
            timeout_seconds=wish.timeout_seconds,
        )
        goal = Goal.of(tried.active)
    return Verified(status, goal)


async def _listed(client: Client, wish: Wish, task: TaskModel) -> Goal | Refusal:
    """What a server's list says of the vector."""
    name = wish.safety_vector
    if name == NO_VECTOR:
        return Goal(safety_vector=name)
    if name.startswith("@") or "/" in name:  # the list has the root's folders alone
        if wish.dry_run:
            return Goal(safety_vector=name)
        return Refusal(client.target.url, f"only a dry run can tell what '{name}' is there")
    found = {vector.name: vector for vector in (await client.vectors()).vectors}.get(name)
    if found is None:
        return Refusal(client.target.url, f"its vector root has no '{name}'")
    if found.fault is not None:
        return Refusal(client.target.url, f"'{name}' cannot be used: {printable(found.fault)}")
    if not found.planned:
        return Refusal(client.target.url, _no_plan(name, task))
    return Goal(safety_vector=name, vector_digest=found.digest, beta=wish.beta)


def _no_plan(name: str, task: TaskModel) -> str:
    """With the command to run, as the server itself would say it of a swap."""
    model, plan = printable(task.id), f"{task.fingerprint.removeprefix('blake3:')}.json"
    return (
        f"'{name}' has no plan for its task model: enchtable plan --task-model {model} "
        f"--base-model BASE --safety-vector ROOT/{name} -o ROOT/{name}/plans/{plan}, "
        "with ROOT for its vector root"
    )


def _disagreements(verified: dict[str, Verified], wish: Wish) -> list[Refusal]:
    """What differs between servers that must not: one roll-out makes one fleet."""
    models = {url: one.status.task_model.fingerprint for url, one in verified.items()}
    kinds: list[tuple[str, dict[str, object]]] = [
        ("vectors of that name", {url: one.goal.vector_digest for url, one in verified.items()})
    ]
    if not wish.allow_mixed_models:
        kinds += [
            ("task models (--allow-mixed-models lets them)", {**models}),
            ("plans", {url: one.goal.plan_digest for url, one in verified.items()}),
            ("β", {url: one.goal.beta for url, one in verified.items()}),
        ]
    return [
        Refusal(None, f"the targets have different {what}: {_examples(values)}")
        for what, values in kinds
        if len(set(values.values())) > 1
    ]


def _examples(values: dict[str, object]) -> str:
    """Each value with the first target that has it."""
    first: dict[object, str] = {}
    for url, value in values.items():
        first.setdefault(value, url)
    return ", ".join(f"{printable(value)} at {url}" for value, url in first.items())
