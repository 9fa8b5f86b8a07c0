"""What plan, load, swap and storage cost at a size that was not measured, from what was.

Every constant is a ratio of medians in benchmarks/results, or an assumption that is named as one.
All times are proportional to bytes or operations: nothing fixed is taken off, and no bound by
the network, so that small things are overrated and large ones are as good as the machine that was
measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.architectures import LLAMA_1B, SMOLLM2_135M, Architecture
from benchmarks.harness.results import NotMeasured, Results
from benchmarks.harness.rows import Row
from benchmarks.kernels_steps import shared_out
from benchmarks.plan_growth import Pace

_BF16 = 2
#: One byte an element, and an fp32 scale for 64 of them.
_INT8 = 1 + 4 / 64
RANKS = 8
_WORKING_DAY_SECONDS = 8 * 3600.0


@dataclass(frozen=True)
class Assumed:
    """What nobody measured here."""

    pods: int = 1000
    cores: int = 96
    host_bytes: float = 2 * 2**40
    hub_bytes_a_second: float = 1e9
    cache_bytes_a_second: float = 10e9
    check_seconds: float = 2.0
    pause_seconds: float = 30.0
    #: As `enchtable rollout` has it: dry runs at the same time.
    dry_runs: int = 8


@dataclass(frozen=True)
class Constants:
    """What was measured, by the byte or by the shape.

    Attributes:
        cold: Of planning.
        cached: Likewise, with the vector's factors.
        read: Seconds for a byte of plain weights, warm.
        merge: Seconds of all cores for a byte of a bf16 vector: reading, hashing, adding. Loading
            on a CPU wins that back elsewhere, in large pages, and on a GPU it does not.
        stage: Seconds of staging for a byte of the tensors that a swap touches.
        pause: Seconds of standing still, likewise.
        cores: Of the machine on which pairs were planned.
        rows: Where they come from.
    """

    cold: Pace
    cached: Pace
    read: float
    merge: float
    stage: float
    pause: float
    cores: int
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, results: Results) -> Constants:
        """Read them off the newest rows.

        Raises:
            NotMeasured: Some are missing.
        """
        planned = [row for row in results.published("plan") if row.op == "plan"]
        cached = Pace.of(planned, "cached")
        loaded = results.published("load")
        swapped = results.published("swap")
        auto = _only(loaded, "load_weights", "auto", "time", rf"{LLAMA_1B.name}, random, warm, .*")
        merge, steps = shared_out(results)
        stage, pause = (
            _only(swapped, "swap", "enchtable", metric, ".*")
            for metric in ("staging", "standing still")
        )
        touched = _BF16 * SMOLLM2_135M.attention_parameters
        machine = re.search(r"(\d+) cores?$", planned[0].device)
        return cls(
            # Reading and digesting is the same work for both.
            Pace.of(planned, "cold").with_besides_of(cached),
            cached,
            auto.p50 / (_BF16 * LLAMA_1B.parameters),
            merge,
            stage.p50 / touched,
            pause.p50 / touched,
            int(machine[1]) if machine else 1,
            (*planned, auto, *steps, stage, pause),
        )


def _only(rows: Sequence[Row], op: str, provider: str, metric: str, shape: str) -> Row:
    found = [r for r in rows if (r.op, r.provider, r.metric) == (op, provider, metric)]
    found = [row for row in found if re.fullmatch(shape, row.shape)]
    if not found:
        what = f"rows of '{op}', {provider}, {metric}"
        raise NotMeasured("constants of scale", expected=what, got="none", fix="Measure them.")
    return found[-1]


@dataclass(frozen=True)
class Costs:
    """Of one model with a vector of the scope 'attention'."""

    model: Architecture
    known: Constants
    assumed: Assumed = Assumed()

    @property
    def weights_bytes(self) -> float:
        """In bf16."""
        return _BF16 * self.model.parameters

    @property
    def vector_bytes(self) -> float:
        """In bf16: what is merged, and as many bytes as a swap touches."""
        return _BF16 * self.model.attention_parameters

    @property
    def small_vector_bytes(self) -> float:
        """In int8."""
        return _INT8 * self.model.attention_parameters

    @property
    def whole_vector_bytes(self) -> float:
        """In bf16, of the scope 'attention+ffn'."""
        return _BF16 * self.model.matrix_parameters

    def plan_seconds(self, provider: str, *, cores: int | None = None) -> float:
        """Of a plan on the machine that was measured, or on so many cores like its own."""
        pace = self.known.cold if provider == "cold" else self.known.cached
        shapes = self.model.attention()
        seconds = pace.plan_seconds(self.model, shapes)
        if cores is None:
            return seconds
        besides = (seconds - pace.all_pairs(shapes)) * self.known.cores / cores
        return besides + pace.longest(shapes, self.known.cores, cores)

    @property
    def load_seconds(self) -> float:
        """That one rank of eight reads its part of the plain weights."""
        return self.known.read * self.weights_bytes / RANKS

    @property
    def added_seconds(self) -> float:
        """That merging takes on each rank: each merges whole tensors."""
        return self.known.merge * self.vector_bytes

    @property
    def staging_seconds(self) -> float:
        """Of a swap, on each rank, while it serves."""
        return self.known.stage * self.vector_bytes

    @property
    def paused_seconds(self) -> float:
        """Of a swap: a rank puts in its part of the tensors."""
        return self.known.pause * self.vector_bytes / RANKS

    @property
    def staged_bytes(self) -> float:
        """Host memory of a machine during a swap: old and new tensors, whole, on each rank."""
        return 2 * self.vector_bytes * RANKS

    def rollout_seconds(self, at_once: int) -> float:
        """Of a roll-out over the fleet: one canary, then so many at once."""
        steps = 1 + math.ceil((self.assumed.pods - 1) / at_once)
        each = self.staging_seconds + self.paused_seconds
        step = each + self.assumed.pause_seconds + self.assumed.check_seconds
        return self.preflight_seconds + steps * step

    @property
    def preflight_seconds(self) -> float:
        """Before anything is changed, every server stages the vector once."""
        return math.ceil(self.assumed.pods / self.assumed.dry_runs) * self.staging_seconds

    def checks(self, at_once: int) -> int:
        """Servers that are asked, over all steps: after each, all that were changed so far."""
        changed = [1, *range(1 + at_once, self.assumed.pods + at_once, at_once)]
        return sum(min(one, self.assumed.pods) for one in changed)

    def needs(self) -> dict[str, float]:
        """What each thing takes, by what there is: above 1 it breaks, or nobody waits for it."""
        it, day = self.assumed, _WORKING_DAY_SECONDS
        pull = it.pods * self.small_vector_bytes / it.hub_bytes_a_second
        return {
            "a swap's host memory, by half of the machine's": self.staged_bytes
            / (it.host_bytes / 2),
            "a roll-out one by one, by a working day": self.rollout_seconds(1) / day,
            "every pod's pull from the Hub, by a working day": pull / day,
            "a cached plan on the machine measured, by a working day": self.plan_seconds("cached")
            / day,
        }
