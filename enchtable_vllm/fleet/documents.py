"""The documents of `docs/http-api.md`, as far as a client depends on them.

A newer server may say more than is known here: unknown keys are kept, so that printing a
document prints all of it. What is needed for a decision is required; the rest has a default.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

#: The name under which no vector is served.
NO_VECTOR = "@none"

Pause = Literal["keep", "wait", "abort"]


class Document(BaseModel):
    """Something that a server said."""

    model_config = ConfigDict(extra="allow", populate_by_name=True, frozen=True)

    def to_json(self) -> dict[str, object]:
        """As it was said, with the defaults of what was not."""
        return self.model_dump(mode="json", by_alias=True)


class TaskModel(Document):
    """The fine-tune underneath."""

    id: str
    fingerprint: str


class Active(Document):
    """What is merged into the weights."""

    safety_vector: str
    vector_digest: str | None
    plan_digest: str | None
    beta: float | None
    scope: str | None = None
    signed_by: str | None = None
    merged: int = 0
    retained_share: float | None = None


class Desired(Document):
    """What the vector root's ``current.json`` names."""

    safety_vector: str
    beta: float | None = None
    version: int | None = None


class SwapRecord(Document):
    """One line of a server's history."""

    epoch: int | None = None
    from_: str | None = Field(default=None, alias="from")
    to: str | None = None
    outcome: str
    phase: str | None = None
    began: str | None = None
    reason: str | None = None


class Rank(Document):
    """One rank's own word for what it computes with."""

    rank: int
    epoch: int
    vector_digest: str | None
    plan_digest: str | None
    beta: float | None
    broken: str | None = None


class Engine(Document):
    """One data-parallel engine."""

    engine: int
    ranks: list[Rank]


class Status(Document):
    """``GET /v1/enchtable/status``."""

    state: Literal["serving", "swapping", "failed"]
    ready: bool
    reason: str | None = None
    weight_version: str
    epoch: int
    task_model: TaskModel
    active: Active
    desired: Desired | None = None
    as_desired: bool | None = None
    not_swappable: str | None = None
    rolls_back_to: str | None = None
    swaps: list[SwapRecord] = []
    disagreeing: int
    engines: list[Engine] = []


class Vector(Document):
    """One entry of ``GET /v1/enchtable/vectors``."""

    name: str
    digest: str | None = None
    planned: bool | None = None
    active: bool = False
    fault: str | None = None


class Vectors(Document):
    """``GET /v1/enchtable/vectors``."""

    vectors: list[Vector]


class Swapped(Document):
    """The answer to a swap or a rollback."""

    outcome: Literal["swapped", "unchanged", "dry_run", "rolled_back"]
    from_: str | None = Field(default=None, alias="from")
    to: str | None = None
    epoch: int
    weight_version: str
    paused_seconds: float | None = None
    swap_seconds: float | None = None
    persisted: bool = False
    warnings: list[str] = []
    active: Active


class Fault(Document):
    """Why a server refused."""

    code: str
    message: str
    fix: str = ""


class Faulty(Document):
    """The document of every error."""

    error: Fault


class Served(BaseModel):
    """What a server computes with, as it is remembered and compared.

    Attributes:
        epoch: The server's count of swaps when it was seen; not part of the comparison.
        weight_version: Its own name for the sum of it.
        beta_of_plan: Whether its vector root names this vector and leaves β to each plan, so that
            what is written there again must leave it too; not part of the comparison.
    """

    model_config = ConfigDict(frozen=True)

    safety_vector: str
    vector_digest: str | None
    plan_digest: str | None
    beta: float | None
    weight_version: str
    epoch: int
    beta_of_plan: bool = False

    @classmethod
    def of(cls, status: Status) -> Served:
        """What a status says."""
        active, desired = status.active, status.desired
        return cls(
            safety_vector=active.safety_vector,
            vector_digest=active.vector_digest,
            plan_digest=active.plan_digest,
            beta=active.beta,
            weight_version=status.weight_version,
            epoch=status.epoch,
            beta_of_plan=bool(status.as_desired and desired and desired.beta is None),
        )

    @property
    def beta_to_ask(self) -> float | None:
        """What to ask for to have this served, and named by the root, again."""
        return None if self.beta_of_plan else self.beta

    def same(self, other: Served) -> bool:
        """Whether the weights are: the names of vectors are not looked at, their bytes are."""
        mine = (self.vector_digest, self.plan_digest, self.beta)
        return mine == (other.vector_digest, other.plan_digest, other.beta)

    def __str__(self) -> str:
        """A few words for people."""
        if self.vector_digest is None:
            return f"{self.safety_vector}, epoch {self.epoch}"
        digest = self.vector_digest.removeprefix("blake3:")[:12]
        return f"{self.safety_vector} {digest}, beta {self.beta}, epoch {self.epoch}"


class Goal(BaseModel):
    """What a server is to compute with; None where it is not known beforehand.

    Known in full after a dry run; without one, as far as the server's list of vectors tells.
    """

    model_config = ConfigDict(frozen=True)

    safety_vector: str
    vector_digest: str | None = None
    plan_digest: str | None = None
    beta: float | None = None

    @classmethod
    def of(cls, active: Active | Served) -> Goal:
        """Just this: what a dry run says would be served, or what was."""
        return cls(
            safety_vector=active.safety_vector,
            vector_digest=active.vector_digest,
            plan_digest=active.plan_digest,
            beta=active.beta,
        )

    @property
    def known(self) -> bool:
        """Whether `met_by` means the very same weights."""
        return self.safety_vector == NO_VECTOR or self.plan_digest is not None

    def met_by(self, served: Served | Active | Rank) -> bool:
        """Whether this is served, in all that is known of it."""
        if self.safety_vector == NO_VECTOR:
            return served.vector_digest is None
        if self.vector_digest is None and not isinstance(served, Rank):
            return self.safety_vector == served.safety_vector
        pairs = (
            (self.vector_digest, served.vector_digest),
            (self.plan_digest, served.plan_digest),
            (self.beta, served.beta),
        )
        return served.vector_digest is not None and all(
            wanted is None or wanted == found for wanted, found in pairs
        )
