"""The tables of docs/scale.md: what larger models and fleets cost, derived, not measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.architectures import EXPERTS_1T, LLAMA_8B, LLAMA_70B, LLAMA_405B
from benchmarks.harness.results import Results
from benchmarks.harness.rows import Row
from benchmarks.harness.tables import Blocks, Table
from benchmarks.harness.units import shown
from benchmarks.scale_model import RANKS, Assumed, Constants, Costs

_MODELS = (LLAMA_8B, LLAMA_70B, LLAMA_405B, EXPERTS_1T)
_MODELLED = "**Modelled**, from the constants above."
_AT_ONCE = (1, 10, 50)


def _costs(results: Results) -> list[Costs]:
    known = Constants.of(results)
    return [Costs(model, known) for model in _MODELS]


def _seconds(value: float) -> str:
    return shown(value, "s")


def _bytes(value: float) -> str:
    return shown(value, "B")


def _constants(results: Results) -> Table:
    known = Constants.of(results)
    largest = max(known.cold.pairs, key=lambda shape: min(shape) ** 2 * max(shape))
    shape = "x".join(map(str, largest))
    gigabyte = 1e9
    lines = [
        [f"planning one pair of {shape}, cold", _seconds(known.cold.pairs[largest])],
        [f"planning one pair of {shape}, cached", _seconds(known.cached.pairs[largest])],
        [
            "what a plan takes besides, a billion parameters",
            _seconds(known.cached.besides_each * 1e9),
        ],
        ["plain weights, warm, a GB", _seconds(known.read * gigabyte)],
        ["reading, hashing and adding a GB of bf16 vector", _seconds(known.merge * gigabyte)],
        ["staging a swap, a GB of touched tensors", _seconds(known.stage * gigabyte)],
        ["standing still, a GB of touched tensors", _seconds(known.pause * gigabyte)],
    ]
    return Table(["measured", "on two cores"], lines, known.rows)


def _assumptions(_: Results) -> str:
    it = Assumed()
    lines = [
        ("GPUs, ranks of one tensor-parallel server", str(RANKS)),
        ("cores of its machine", str(it.cores)),
        ("host memory of its machine", _bytes(it.host_bytes)),
        ("from the Hub to the whole fleet", shown(it.hub_bytes_a_second, "B/s")),
        (
            "from a cache inside the cluster to the whole fleet",
            shown(it.cache_bytes_a_second, "B/s"),
        ),
        ("pods", str(it.pods)),
        ("checking one step of a roll-out", _seconds(it.check_seconds)),
        ("`--pause` of a roll-out", _seconds(it.pause_seconds)),
    ]
    return "".join(
        f"| {what} | {value} |\n" for what, value in (("assumed", ""), ("---", "---"), *lines)
    )


_Figure = Callable[[Costs], str]


def _table(
    costs: Sequence[Costs], figures: Mapping[str, _Figure], rows: Sequence[Row], note: str
) -> Table:
    """A column for each model."""
    lines = [[what, *map(figure, costs)] for what, figure in figures.items()]
    return Table(["", *(cost.model.name for cost in costs)], lines, rows, note)


def _storage(results: Results) -> Table:
    figures: dict[str, _Figure] = {
        "weights, bf16": lambda c: _bytes(c.weights_bytes),
        "vector, attention, bf16": lambda c: _bytes(c.vector_bytes),
        "vector, attention, int8": lambda c: _bytes(c.small_vector_bytes),
        "vector, attention+ffn, bf16": lambda c: _bytes(c.whole_vector_bytes),
    }
    return _table(_costs(results), figures, (), "From the shapes alone: nothing here is measured.")


def _machine(results: Results) -> Table:
    costs, cores = _costs(results), Assumed().cores
    figures: dict[str, _Figure] = {
        "plan, cold, on the machine measured": lambda c: _seconds(c.plan_seconds("cold")),
        "plan, cached, on the machine measured": lambda c: _seconds(c.plan_seconds("cached")),
        f"plan, cached, `--jobs {cores}` on as many such cores": lambda c: _seconds(
            c.plan_seconds("cached", cores=cores)
        ),
        f"load: plain weights, each of {RANKS} ranks its part": lambda c: _seconds(c.load_seconds),
        "load: what merging takes on each rank": lambda c: _seconds(c.added_seconds),
        "swap: staging, while it serves": lambda c: _seconds(c.staging_seconds),
        "swap: standing still": lambda c: _seconds(c.paused_seconds),
        "swap: host memory of the machine": lambda c: _bytes(c.staged_bytes),
    }
    return _table(costs, figures, costs[0].known.rows, _MODELLED)


def _fleet(results: Results) -> Table:
    costs, it = _costs(results), Assumed()

    def pulled(what: str, rate: float) -> _Figure:
        return lambda cost: _seconds(it.pods * getattr(cost, what) / rate)

    figures = {
        "a vector (int8) to every pod": lambda c: _bytes(it.pods * c.small_vector_bytes),
        "— from the Hub": pulled("small_vector_bytes", it.hub_bytes_a_second),
        "— from the cluster's cache": pulled("small_vector_bytes", it.cache_bytes_a_second),
        "merged weights instead, from that cache": pulled("weights_bytes", it.cache_bytes_a_second),
        f"roll-out: dry runs, {it.dry_runs} at once": lambda c: _seconds(c.preflight_seconds),
    }
    for at_once in _AT_ONCE:
        figures[f"roll-out, `--max-unavailable {at_once}`"] = _rolled_out(at_once)
    asked = ", ".join(f"{costs[0].checks(k):,} with {k} at once" for k in _AT_ONCE)
    note = f"{_MODELLED} Servers checked in all steps together: {asked}."
    return _table(costs, figures, costs[0].known.rows, note)


def _rolled_out(at_once: int) -> _Figure:
    return lambda cost: _seconds(cost.rollout_seconds(at_once))


def _breaks(results: Results) -> Table:
    """Need by limit: what is exceeded the most comes first."""
    costs = _costs(results)
    lines = []
    for cost in costs:
        (first, worst), *others = sorted(cost.needs().items(), key=lambda need: -need[1])
        over = [f"{what} ({share:.1f}×)" for what, share in others if share > 1]
        lines.append([cost.model.name, f"**{first} ({worst:.1f}×)**", "; ".join(over) or "nothing"])
    head = ["", "nearest to its limit, or furthest over it", "also over"]
    return Table(head, lines, costs[0].known.rows, _MODELLED)


TABLES: Blocks = {
    "scale-constants": _constants,
    "scale-assumptions": _assumptions,
    "scale-storage": _storage,
    "scale-machine": _machine,
    "scale-fleet": _fleet,
    "scale-breaks": _breaks,
}
