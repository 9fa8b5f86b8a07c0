"""The section about a live server."""

from __future__ import annotations

from collections.abc import Iterator

from enchtable_vllm.checkpoint import short
from enchtable_vllm.page import Html, cell, label, paragraph, table
from enchtable_vllm.report.charts import number
from enchtable_vllm.report.served import Served

_MOST_SAMPLES = 200


def live(served: Served) -> Iterator[Html]:
    """Its state, its ranks, its last swaps, and its metrics."""
    said, active = served.status, served.status.active
    state = said.state + (", ready" if said.ready else ", not ready")
    rows: list[tuple[object, object]] = [
        ("server", cell(label(served.url), f"asked {served.asked}")),
        ("state", cell(state, said.reason or "")),
        ("task model", cell(label(said.task_model.id), said.task_model.fingerprint)),
        ("safety vector", cell(label(active.safety_vector), active.vector_digest or "")),
        ("signed by", label(active.signed_by or "not known: the server demands no signature")),
        ("plan", cell(f"beta {active.beta}, scope {active.scope}", active.plan_digest or "")),
        ("merged", f"{active.merged} tensors, retained share {_share(active.retained_share)}"),
        ("version", cell(label(said.weight_version), f"epoch {said.epoch}")),
        ("rolls back to", label(said.rolls_back_to or "nothing")),
    ]
    yield table(("", ""), rows)
    ranks = [
        (
            f"engine {engine.engine}, rank {rank.rank}",
            rank.epoch,
            _digest(rank.vector_digest),
            _digest(rank.plan_digest),
            rank.beta if rank.beta is not None else "none",
            rank.broken or "no",
        )
        for engine in said.engines
        for rank in engine.ranks
    ]
    if ranks:
        head = ("rank", "epoch", "vector", "plan", "beta", "broken")
        yield table(head, ranks, caption="By each rank's own word")
    if said.swaps:
        swaps = [
            (
                f"epoch {swap.epoch}",
                label(swap.from_ or "none"),
                label(swap.to or "none"),
                cell(swap.outcome, swap.reason or ""),
                swap.began or "",
            )
            for swap in said.swaps
        ]
        yield table(("swap", "from", "to", "outcome", "began"), swaps, caption="The last swaps")
    if not served.samples:
        yield paragraph("It shows no metrics of this project on /metrics.", "note")
        return
    values = served.values()[:_MOST_SAMPLES]
    yield table(
        ("metric", "value"),
        [(label(name, 160), f"{value:g}") for name, value in values],
        caption="Metrics",
    )
    means = served.means()[:_MOST_SAMPLES]
    if means:
        yield table(
            ("metric", "how many", "mean"),
            [(label(name, 160), count, number(mean)) for name, count, mean in means],
            caption="Metrics that are distributions, since the server's start",
        )


def _share(share: float | None) -> str:
    return "not known" if share is None else f"{share:.1%}"


def _digest(digest: str | None) -> str:
    return "none" if digest is None else short(digest)
