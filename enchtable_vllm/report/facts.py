"""Everything that the page says, as plain data: what ``--json`` prints."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic_core import to_jsonable_python

from enchtable_vllm.plan import ResolvedPlan
from enchtable_vllm.report.cells import Cell, Matrix, Spread, cells, matrices
from enchtable_vllm.report.concerns import concerns
from enchtable_vllm.report.origin import Link, chain
from enchtable_vllm.report.printed import Merged, Planned
from enchtable_vllm.report.served import Served
from enchtable_vllm.vector import SafetyVector


@dataclass(frozen=True)
class Fate:
    """Tensors to which one thing happens for one reason.

    Attributes:
        what: ``merged``, ``kept`` (bit for bit), or ``refused`` (of base model or vector, not in
            the task model).
        why: In the plan's words.
        names: In name order.
    """

    what: str
    why: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Norms:
    """The numbers that settle how much is added.

    Attributes:
        task, safety: ‖T‖₂ and ‖S‖₂.
        change: ‖c · S‖₂ over everything that is merged, before rounding.
    """

    beta: float
    norm_scale: float
    task: float
    safety: float
    change: float


@dataclass(frozen=True)
class Facts:
    """About one plan, and what was made or is served of it.

    Attributes:
        warnings: What a person should look into, the most serious first.
        origin: Base model, task model, vector, plan and what came of it, each by digest.
        norms: See there.
        scope, rank_fraction: In force; γ.
        expected_retained_share: Over all; None at another β or scope than the plan's.
        kept_share: Of the elements, where the plan has masks.
        overall: Of each measure, over all matrices.
        grid: Layers and modules.
        matrices: Every matrix; too many to print, so not in `to_json`.
        fates: What happens to each tensor, and why.
        rungs: How many factorisations each algorithm did; the later ones are the slower ones.
        seconds: What each tensor's linear algebra took, where that was given.
        merged, served: What was found out besides the plan, where it was asked for.
    """

    warnings: tuple[str, ...]
    origin: tuple[Link, ...]
    norms: Norms
    scope: str
    rank_fraction: float
    expected_retained_share: float | None
    kept_share: float | None
    overall: dict[str, Spread]
    grid: tuple[Cell, ...]
    matrices: tuple[Matrix, ...]
    fates: tuple[Fate, ...]
    rungs: dict[str, int]
    seconds: dict[str, float] | None = None
    merged: Merged | None = None
    served: Served | None = None

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "matrices"}
        served = None if self.served is None else self.served.to_json()
        document: dict[str, Any] = to_jsonable_python(shown | {"served": served})
        return document


def collect(
    resolved: ResolvedPlan,
    *,
    vector: SafetyVector | None = None,
    planned: Planned | None = None,
    merged: Merged | None = None,
    served: Served | None = None,
) -> Facts:
    """Gather the facts; what is given must belong to the plan.

    Args:
        resolved: The plan, with β and scope in force.
        vector: The safety vector, opened; its manifest says where it comes from.
        planned: What ``enchtable plan --json`` said.
        merged: What ``enchtable merge --json`` said.
        served: What a server says.

    Raises:
        MismatchError: The vector, or what a command said, is not this plan's.
    """
    if vector is not None:
        resolved.check_vector(vector)
    for said in (planned, merged):
        if said is not None:
            said.check(resolved)
    plan = resolved.plan
    found = matrices(resolved)
    grid = cells(resolved, found)
    known = found[0].retained_share is not None
    expected = plan.retained_share if known else None
    return Facts(
        warnings=tuple(concerns(resolved, found, expected, vector, merged, served)),
        origin=tuple(chain(resolved, vector, merged, served)),
        norms=Norms(
            resolved.beta,
            resolved.norm_scale,
            plan.task_norm,
            math.hypot(*(cell.safety_norm for cell in grid)),
            math.hypot(*(cell.change_norm for cell in grid)),
        ),
        scope=resolved.scope,
        rank_fraction=plan.rank_fraction,
        expected_retained_share=expected,
        kept_share=None if plan.masks is None else plan.masks.kept_share,
        overall=_overall(found),
        grid=tuple(grid),
        matrices=tuple(found),
        fates=tuple(_fates(resolved)),
        rungs=dict(Counter(rung for matrix in found for rung in matrix.rungs)),
        seconds=None if planned is None else planned.seconds,
        merged=merged,
        served=served,
    )


def _overall(found: Sequence[Matrix]) -> dict[str, Spread]:
    shares = {m.name: m.retained_share for m in found if m.retained_share is not None}
    columns = {
        "interference": [m.interference for m in found],
        "attenuation": [m.attenuation for m in found],
        "coefficient": [m.coefficient for m in found],
        "retained_share": list(shares.values()),
    }
    return {name: Spread.of(values) for name, values in columns.items() if values}


def _fates(resolved: ResolvedPlan) -> list[Fate]:
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    merged = f"in the safety vector, in scope '{resolved.scope}'"
    reasons["merged", merged] = sorted(resolved.coefficients)
    for name, why in sorted(resolved.kept.items()):
        reasons["kept", why].append(name)
    for name, why in sorted(resolved.plan.unused.items()):
        reasons["refused", why].append(name)
    return [Fate(what, why, tuple(names)) for (what, why), names in reasons.items()]
