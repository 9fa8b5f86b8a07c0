"""What a live server says it serves: its status, and its own metrics."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from enchtable_vllm.fleet import Client, ServerRefused
from enchtable_vllm.fleet.documents import NO_VECTOR, Status
from enchtable_vllm.fleet.samples import Sample, read_samples
from enchtable_vllm.plan import ResolvedPlan


@dataclass(frozen=True)
class Served:
    """What was said, and when.

    Attributes:
        url: Of the server.
        asked: In UTC.
        status: Its document.
        samples: Those of its metrics that are numbers; none where it shows none.
    """

    url: str
    asked: str
    status: Status
    samples: tuple[Sample, ...]

    def values(self) -> list[tuple[str, float]]:
        """Gauges and counters: name with labels, value."""
        histograms = {s.name.removesuffix("_bucket") for s in self.samples if "le" in s.labels}
        parts = {f"{name}{end}" for name in histograms for end in ("_bucket", "_sum", "_count")}
        return [
            (_named(s), s.value)
            for s in self.samples
            if s.name not in parts and not s.name.endswith("_created")
        ]

    def means(self) -> list[tuple[str, int, float]]:
        """Histograms that hold something: name with labels, how many, their mean."""
        sums: dict[str, dict[str, float]] = defaultdict(dict)
        for sample in self.samples:
            for end in ("_sum", "_count"):
                if sample.name.endswith(end):
                    name = _named(Sample(sample.name.removesuffix(end), sample.labels, 0.0))
                    sums[name][end] = sample.value
        return [
            (name, int(parts["_count"]), parts["_sum"] / parts["_count"])
            for name, parts in sums.items()
            if len(parts) == 2 and parts["_count"] > 0
        ]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "url": self.url,
            "asked": self.asked,
            "status": self.status.to_json(),
            "metrics": [
                {"name": s.name, "labels": dict(s.labels), "value": s.value} for s in self.samples
            ],
        }

    def concerns(self, resolved: ResolvedPlan) -> list[str]:
        """Where it is not well, or does not serve this plan."""
        said, active = self.status, self.status.active
        found = []
        if said.state == "failed":
            found.append(f"generation is paused: {said.reason or 'the server does not say why'}")
        elif not said.ready:
            found.append(f"it is not ready: {said.reason or 'it does not say why'}")
        if said.disagreeing:
            found.append(f"{said.disagreeing} of its ranks serve something else than the others")
        for engine in said.engines:
            found += [
                f"engine {engine.engine}, rank {rank.rank} is broken: {rank.broken}"
                for rank in engine.ranks
                if rank.broken
            ]
        if said.as_desired is False:
            found.append("a restart would serve something else than it serves now")
        if said.task_model.fingerprint != resolved.plan.task_model.fingerprint:
            found.append(
                f"it serves another task model than the plan's: '{said.task_model.id}' "
                f"{said.task_model.fingerprint}"
            )
        if active.safety_vector == NO_VECTOR:
            found.append("it serves the task model without any safety vector")
        elif active.vector_digest != resolved.plan.safety_vector.fingerprint:
            found.append(f"it serves another safety vector than the plan's: {active.safety_vector}")
        elif active.plan_digest != resolved.digest:
            found.append(f"it serves this vector by another plan: {active.plan_digest}")
        elif active.beta is not None and not math.isclose(active.beta, resolved.beta):
            found.append(
                f"it serves this plan at beta {active.beta:g}; this page is about beta "
                f"{resolved.beta:g}. Make it again with --beta {active.beta:g}"
            )
        elif active.scope is not None and active.scope != resolved.scope:
            found.append(
                f"it serves this plan in scope {active.scope}; this page is about "
                f"{resolved.scope}. Make it again with --scope {active.scope}"
            )
        return [f"the server {self.url}: {fault}" for fault in found]


async def ask(client: Client) -> Served:
    """Ask a server. Metrics that it does not show are no fault.

    Raises:
        Unreachable: No answer came.
        ServerRefused: It does not say what it serves.
    """
    async with client:
        status = await client.status()
        try:
            samples = read_samples(await client.metrics())
        except ServerRefused:  # a gateway may keep them to itself
            samples = []
    numbers = tuple(s for s in samples if math.isfinite(s.value))
    asked = datetime.now(UTC).isoformat(timespec="seconds")
    return Served(client.target.url, asked, status, numbers)


def _named(sample: Sample) -> str:
    labels = ", ".join(f"{key} {value}" for key, value in sample.labels.items())
    return f"{sample.name} ({labels})" if labels else sample.name
