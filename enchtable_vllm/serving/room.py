"""What a rank serves, kept with the model that serves it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from blake3 import blake3

from enchtable_vllm.checkpoint import Location, short
from enchtable_vllm.errors import MismatchError
from enchtable_vllm.merge import MergeReport
from enchtable_vllm.merge.report import Rounding
from enchtable_vllm.plan import ResolvedPlan
from enchtable_vllm.plan.vector_root import NO_VECTOR
from enchtable_vllm.serving.choice import Choice
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import MADE_AHEAD, OpenTask, PlanSource, Prepared

#: How many vectors a server can go back through, and how many swaps it tells of.
_HISTORY = 20


def _identity(resolved: ResolvedPlan | None, rounding: Rounding | None) -> dict[str, Any]:
    if resolved is None:
        return dict.fromkeys(("vector_digest", "plan_digest", "beta", "scope", "rounding"))
    return {
        "vector_digest": resolved.plan.safety_vector.fingerprint,
        "plan_digest": resolved.digest,
        "beta": resolved.beta,
        "scope": resolved.scope,
        "rounding": rounding,
    }


def merge_identity(prepared: Prepared | None) -> dict[str, Any]:
    """The identity that a merge would have: see `Active.identity`."""
    if prepared is None:
        return _identity(None, None)
    return _identity(prepared.resolved, prepared.config.rounding)


@dataclass(frozen=True)
class Active:
    """What is merged into the weights, and with what effect.

    Attributes:
        choice: What was asked for.
        report: The outcome; None: no vector.
        plan_source: Where the plan came from.
        signed_by: Who signed vector and plan; None: nobody had to.
    """

    choice: Choice
    report: MergeReport | None
    plan_source: PlanSource = MADE_AHEAD
    signed_by: str | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        if self.choice.name is not None:
            return self.choice.name
        return self.report.resolved.plan.safety_vector.name if self.report else NO_VECTOR

    @property
    def identity(self) -> dict[str, Any]:
        """What tells one merge from another: two ranks that agree in it serve the same."""
        resolved, rounding = (None, None)
        if self.report is not None:
            resolved, rounding = self.report.resolved, self.report.rounding
        return _identity(resolved, rounding)

    @property
    def weight_version(self) -> str:
        """Name and digest of the identity: the same merge always has the same version."""
        if self.report is None:
            return NO_VECTOR
        parts = "\n".join(f"{key}={value!r}" for key, value in self.identity.items())
        return f"{self.name}:{short(blake3(parts.encode()).hexdigest())}"


@dataclass(frozen=True)
class Earlier:
    """What was served, as far as going back to it needs: no plan, no effects of every matrix.

    Attributes:
        choice: What was asked for.
        name, identity: As `Active`'s.
    """

    choice: Choice
    name: str
    identity: dict[str, Any]

    @classmethod
    def of(cls, active: Active) -> Earlier:
        """Of what is still served."""
        return cls(active.choice, active.name, active.identity)


def refuse_another(expected: Active | Earlier, found: dict[str, Any]) -> None:
    """Refuse what has the name of something that was served, but not its identity.

    Raises:
        MismatchError: It has another.
    """
    if expected.identity != found:
        raise MismatchError(
            f"safety vector '{expected.name}'",
            expected=f"what was merged before, {expected.identity}",
            got=found,
            fix="Its files were replaced since. Put them back, or give the new ones a name of "
            "their own; going back exactly is not possible without them.",
        )


@dataclass(frozen=True)
class ServedTask:
    """A task model as it was when it was loaded, its files no longer open.

    Attributes:
        location, fingerprint, cache_dir: As `OpenTask`'s.
    """

    location: Location
    fingerprint: str
    cache_dir: str | None

    @classmethod
    def of(cls, task: OpenTask) -> ServedTask:
        """Of one that has been loaded."""
        return cls(task.location, task.fingerprint, task.cache_dir)


def refuse_another_task(served: ServedTask, found: OpenTask) -> None:
    """Refuse another task model than the one that is served.

    Raises:
        MismatchError: Its files were replaced since it was loaded, or it is another.
    """
    if served.fingerprint != found.fingerprint:
        raise MismatchError(
            found.checkpoint.what,
            expected=f"the task model that is served, {served.fingerprint}",
            got=found.fingerprint,
            fix="Its files were replaced since the server started: put them back, or restart.",
        )


def until_complete(
    room: Room, tensors: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A reload's tensors: from the first to the last the model is of two kinds."""
    room.half_reloaded = True
    yield from tensors
    room.half_reloaded = False


@dataclass
class Room:
    """One model in one process.

    Attributes:
        start: The server's own config.
        task: The task model, as it was when it was loaded.
        active: What is served.
        epoch: How many swaps have changed it.
        before: What was served earlier, the latest last, each with what the swap away from it
            wrote to the root's ``current.json``.
        swaps: The last swaps, the newest first.
        broken: Why this rank's weights cannot be trusted; None when they can.
        half_reloaded: Whether a reload by vLLM, not a swap's, broke off.
        rank: What exchanges them, once somebody has asked.
    """

    start: LoaderConfig
    task: ServedTask
    active: Active
    epoch: int = 0
    before: deque[tuple[Earlier, dict[str, Any] | None]] = field(
        default_factory=lambda: deque(maxlen=_HISTORY)
    )
    swaps: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    broken: str | None = None
    half_reloaded: bool = False
    rank: Any = None


_rooms: WeakKeyDictionary[torch.nn.Module, Room] = WeakKeyDictionary()
_lock = threading.Lock()


def enter(model: torch.nn.Module, room: Room) -> None:
    """Remember what a model serves, for as long as it lives."""
    with _lock:
        _rooms[model] = room


def room_of(model: torch.nn.Module) -> Room | None:
    """What a model serves; None for one that was not loaded by us."""
    with _lock:
        return _rooms.get(model)
