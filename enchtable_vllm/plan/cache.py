"""Plans computed while a server starts: once for all its ranks, and once for all its starts."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from blake3 import blake3
from filelock import FileLock

from enchtable_vllm.checkpoint import Checkpoint, FileTransaction, Location, sampled_fingerprint
from enchtable_vllm.envs import plans_folder
from enchtable_vllm.errors import ConfigError, MergePlanError
from enchtable_vllm.plan.compute import PlanOptions, compute_plan
from enchtable_vllm.plan.journal import Journal
from enchtable_vllm.plan.merge_plan import MergePlan
from enchtable_vllm.plan.resolve import read_plan, resolve_plan
from enchtable_vllm.progress import Progress, silent
from enchtable_vllm.vector import SafetyVector, factors

#: Part of the key, beside that of the factors: raised whenever what is done with them changes.
_COMPUTATION = 2


class CachedPlan(NamedTuple):
    """A plan, and whether it was at hand.

    Attributes:
        plan: As read.
        digest: Of its file.
        hit: Whether it was there before it was asked for.
    """

    plan: MergePlan
    digest: str
    hit: bool


def cached_plan(
    task: Location,
    base: Location,
    vector: SafetyVector,
    options: PlanOptions,
    *,
    progress: Progress = silent,
) -> CachedPlan:
    """The plan for these inputs; computed only if not at hand.

    The first of several ranks computes; the others wait for its file. An interrupted
    computation continues at the next start. Several machines make
    several computations: share ``ENCHTABLE_CACHE`` between them, or make the plan ahead.

    Raises:
        EnchTableError: As `compute_plan`.
    """
    parts = [
        f"{factors.COMPUTATION} {_COMPUTATION}",
        sampled_fingerprint(Checkpoint(task.path, what="task model")),
        sampled_fingerprint(Checkpoint(base.path, what="base model")),
        vector.fingerprint,
        repr(options.rank_fraction),
        repr(options.beta),
        options.scope or vector.manifest.scope,
    ]
    key = blake3("\n".join(parts).encode()).hexdigest()
    folder = plans_folder()
    path = folder / f"{key}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            if path.is_file():
                with suppress(MergePlanError):  # damaged: computed again
                    cached = read_plan(path)
                    resolve_plan(*cached)
                    return CachedPlan(*cached, hit=True)
            with (
                FileTransaction(path) as partial,
                Journal(folder / f"{key}.journal") as journal,
            ):
                plan = compute_plan(task, base, vector, options, journal=journal, progress=progress)
                partial.write_text(plan.to_json(), encoding="utf-8")
            return CachedPlan(*read_plan(path), hit=False)
    except OSError as error:
        raise ConfigError(
            f"plan cache '{folder}'",
            expected="a folder that can be written to",
            got=error,
            fix="Set ENCHTABLE_CACHE to one, or make the plan ahead with 'enchtable plan'.",
        ) from error
