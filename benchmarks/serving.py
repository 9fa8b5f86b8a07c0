"""A merged model served against the same model unmerged: TTFT, TPOT, end to end, tokens/s.

Two servers of the real small model (SmolLM2-135M-Instruct), one merging while it loads, one of
plain vLLM without a plugin of ours. Both are up all the time and take turns, one round of ``vllm
bench serve`` each, in alternating order; both are started anew a few times, in alternating order
too. Then ``vllm bench latency`` and ``throughput``, an engine for each, in turns.

Merging changes values and nothing else, so the ratio that is expected is 1: the claim is that its
95% interval lies inside 0.98 to 1.02. A measurement that cannot fail proves nothing: ``plant``
makes the merged server really slower by that share, and the claim must then fail.

Before that: both have the same modules and tensors, of the same layout, and the same compiled code;
the weights are those of the offline merge.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks import plant, served, structure
from benchmarks.harness import NotVerified, Row, row
from benchmarks.harness import Options as BaseOptions
from benchmarks.harness.interval import Ratio
from benchmarks.harness.paired import paired_ratio, verdict
from benchmarks.harness.results import Results
from benchmarks.harness.tables import Table
from benchmarks.harness.units import shown
from benchmarks.vllm_bench import TOKENS, Ask, Figures, Offline, offline, serve, unit
from enchtable_vllm.demo.server import Server

PEER = "unmerged"
QUICK = {"starts": 1, "pairs": 2, "clients": ("2",), "offline": 0, "graph": False}
FULL = {"starts": 5, "pairs": 12, "offline": 4, "compiled": True}
LEAST, MOST = 0.98, 1.02
#: The claim is about these; tails of a few requests are shown and decide nothing.
CLAIMED = ("TTFT, p50", "TPOT, p50", "end to end, p50", TOKENS)
_OURS, _MODEL = "merged", "SmolLM2-135M-Instruct"
_LAYERS = 2
_REQUESTS_OF_A_CLIENT = 3
_STARTS = re.compile(r", (\d+) starts?$")


class Options(BaseOptions):
    """Of serving."""

    clients: tuple[int, ...] = Field(default=(1, 4), description="requests at once")
    starts: int = Field(default=2, ge=1, description="of both servers")
    pairs: int = Field(default=6, ge=1, description="of rounds, after each start")
    prompt_tokens: int = Field(default=32, ge=1, description="of a request")
    output_tokens: int = Field(default=32, ge=2, description="of a request")
    offline: int = Field(default=1, ge=0, description="pairs of runs of each offline benchmark")
    compiled: bool = Field(default=False, description="servers compile; their start takes minutes")
    graph: bool = Field(default=True, description="the compiled code is compared, too")
    plant: float = Field(default=0.0, ge=0, description="the share by which 'merged' is slowed")


def verify(options: Options) -> None:
    """Merged and unmerged differ in the values of the merged weights, and in nothing else."""
    case = served.apart(served.small_case, options.scratch / "small")
    merged = demand_same_structure(case, options.scratch / "eager", enforce_eager=True)
    offline = structure.structure(
        options.scratch / "offline", model=str(case.offline), enforce_eager=True
    )
    if merged["digests"] != offline["digests"]:
        raise NotVerified(
            "merged weights", expected="those of the offline merge", got="others",
            fix="No figure is reported.",
        )  # fmt: skip
    if options.graph:
        first = served.apart(served.small_case, options.scratch / "first-layers", _LAYERS)
        demand_same_structure(first, options.scratch / "graph")


def demand_same_structure(case: served.Case, folder: Path, **engine: object) -> dict[str, Any]:
    """With and without a merge, vLLM makes the same of a model; what it makes is returned.

    Raises:
        NotVerified: Something besides the values of weights differs, or not even those.
    """
    merging = {"load_format": "enchtable", "model_loader_extra_config": case.keys}
    plain = {"model": str(case.task), **engine}
    found = structure.structures(folder, {_OURS: {**plain, **merging}, PEER: plain})
    differing = structure.differences(found[_OURS], found[PEER])
    if differing.keys() != {"digests"}:
        raise NotVerified(
            "the model, merged and not", expected="weights' values that differ, and nothing else",
            got=differing, fix="No figure is reported.",
        )  # fmt: skip
    if not engine.get("enforce_eager") and not (found[PEER]["keys"] and found[PEER]["code"]):
        raise NotVerified("compiled code", expected="some, to compare", got="none", fix="")
    return found[_OURS]


def measure(options: Options) -> Iterator[Row]:
    """Figures of a round, in the order of the rounds: those of a pair stand in the same place."""
    case = served.Case.of(options.scratch / "small")
    found: dict[tuple[int, str], list[Figures]] = defaultdict(list)
    for start in range(options.starts):
        with ExitStack() as stack:
            servers = _started(stack, case, options, start)
            for clients in options.clients:
                _rounds(servers, _ask(options, clients), options, start, found)
    for clients in options.clients:
        shape = f"{_MODEL}, {_count(clients, 'client')}, {_count(options.starts, 'start')}"
        for provider in (PEER, _OURS):
            yield from _rows("serve", provider, shape, found[clients, provider])
    yield from _offline(case, "latency", options)
    yield from _offline(case, "throughput", options)


def _ask(options: Options, clients: int) -> Ask:
    requests = clients * _REQUESTS_OF_A_CLIENT
    return Ask(clients, requests, options.prompt_tokens, options.output_tokens)


def _started(
    stack: ExitStack, case: served.Case, options: Options, start: int
) -> dict[str, Server]:
    """Both servers; who is first alternates."""
    servers = {}
    for name in _turn((PEER, _OURS), start):
        log = options.scratch / f"{name}-{start}.log"
        plugins, variables, arguments = [], {}, []
        if name == _OURS:
            plugins, arguments = ["enchtable"], case.merging
            if options.plant:
                plugins.append(plant.NAME)
                variables = plant.variables(options.scratch / "plant", options.plant)
        server = served.server(
            case.task, log, arguments, plugins=plugins, compiled=options.compiled, **variables
        )
        servers[name] = stack.enter_context(server)
    merged = {name: len(server.lines("safety vector merged: ")) for name, server in servers.items()}
    if merged != {_OURS: 1, PEER: 0}:
        raise NotVerified("servers that merged", expected=_OURS, got=merged, fix="See their logs.")
    return servers


def _rounds(
    servers: dict[str, Server],
    ask: Ask,
    options: Options,
    start: int,
    found: dict[tuple[int, str], list[Figures]],
) -> None:
    for pair in range(-1, options.pairs):  # the first warms the kernels for these shapes
        for name in _turn((PEER, _OURS), pair + start):
            time.sleep(served.IDLE_SECONDS)
            seed = start * options.pairs + pair + 1
            figures = serve(servers[name].url, servers[name].command[2], ask, seed)
            if pair >= 0:
                found[ask.clients, name].append(figures)


def _offline(case: served.Case, kind: Offline, options: Options) -> Iterator[Row]:
    ask = _ask(options, max(options.clients))
    engine = ["--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager"]
    found: dict[str, list[Figures]] = defaultdict(list)
    for pair in range(options.offline):
        for name in _turn((PEER, _OURS), pair):
            merging = case.merging if name == _OURS else []
            made = offline(kind, case.task, ask, [*engine, *merging], options.scratch)
            found[name].append(made)
    for name, figures in found.items():
        yield from _rows(kind, name, f"{_MODEL}, a batch of {ask.clients}", figures)


def _rows(op: str, provider: str, shape: str, rounds: Sequence[Figures]) -> Iterator[Row]:
    for metric in rounds[0]:
        values = [figures[metric] for figures in rounds]
        yield row(op, provider, shape, "bf16", values, metric=metric, unit=unit(metric))


def _turn(names: tuple[str, str], number: int) -> tuple[str, ...]:
    return names if number % 2 == 0 else names[::-1]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def comparisons(rows: Sequence[Row]) -> Iterator[tuple[Row, Row, str, str]]:
    """Merged, unmerged, their ratio within pairs, and what becomes of the claim."""
    peers = {row.what: row for row in rows if row.provider == PEER}
    for ours in rows:
        if ours.provider == _OURS and ours.what in peers:
            theirs = peers[ours.what]
            starts = _STARTS.search(ours.shape)
            blocks = int(starts[1]) if starts else 1
            ratio = paired_ratio(ours.samples, theirs.samples, blocks)
            claimed = ours.op == "serve" and ours.metric in CLAIMED and ratio.low is not None
            outcome = verdict(ratio, LEAST, MOST) if claimed else ""
            yield ours, theirs, _shown(ratio), outcome


def _shown(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f}"
    return f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"


def bounds(rows: list[Row]) -> Iterator[str]:
    """Claims that fail, or that this run cannot decide."""
    for ours, _, ratio, outcome in comparisons(rows):
        if outcome in ("fails", "undecided"):
            yield (
                f"{ours.shape}: {ours.metric}: merged / unmerged {ratio}: the claim, "
                f"{LEAST} to {MOST}, {'fails' if outcome == 'fails' else 'is undecided'}"
            )


def _table(results: Results) -> Table:
    rows = results.published("serving")
    lines = [
        [
            f"`vllm bench {ours.op}`, {_STARTS.sub('', ours.shape.removeprefix(_MODEL + ', '))}",
            ours.metric,
            shown(theirs.p50, theirs.unit),
            shown(ours.p50, ours.unit),
            ratio,
            outcome,
        ]
        for ours, theirs, ratio, outcome in comparisons(rows)
    ]
    return Table(["what", "figure", PEER, _OURS, "ratio in pairs", "0.98–1.02"], lines, rows)


TABLES = {"serving": _table}
