"""A merged model served against the same model unmerged: TTFT, TPOT, end to end, tokens/s.

Two servers of the real small model (SmolLM2-135M-Instruct). One is of ours: its vector is swapped
out and in, so that merged and unmerged are one process, in one place in memory, and the difference
is the merge's alone. The other is plain vLLM without a plugin of ours: what differs there is the
plugin's, and what two starts of the very same server differ by. All are up all the time and take
turns, one short round of ``vllm bench serve`` each, in alternating order, plain vLLM every third
time; the servers are started anew a few times, in alternating order too. Then ``vllm bench
latency`` and ``throughput``, an engine for each, in turns.

Merging changes values and nothing else, so the ratio that is expected is 1: the claim is that its
95% interval lies inside 0.98 to 1.02. A measurement that cannot fail proves nothing: ``plant``
makes the merged model's steps really longer by that share, which the measurement must then find.

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
from typing import Any, Self

from pydantic import Field, model_validator

from benchmarks import plant, served, structure
from benchmarks.harness import NotVerified, Row, row
from benchmarks.harness import Options as BaseOptions
from benchmarks.harness.interval import Ratio
from benchmarks.harness.paired import LEAST_PAIRS, paired_ratio, verdict
from benchmarks.harness.results import Results
from benchmarks.harness.rows import MOST_SAMPLES
from benchmarks.harness.tables import Table
from benchmarks.harness.units import shown
from benchmarks.vllm_bench import TOKENS, Ask, Figures, Offline, offline, serve, unit
from enchtable_vllm.demo.server import Server
from enchtable_vllm.plan.vector_root import NO_VECTOR

PEER = "unmerged"
QUICK = {"starts": 1, "pairs": 2, "clients": ("2",), "offline": 0, "graph": False}
FULL = {"starts": 5, "pairs": 20, "seconds": 0, "offline": LEAST_PAIRS, "compiled": True}
LEAST, MOST = 0.98, 1.02
#: The claim is about these; tails of a few requests are shown and decide nothing.
_PER_TOKEN = "TPOT, p50"
CLAIMED = ("TTFT, p50", _PER_TOKEN, "end to end, p50", TOKENS)
PLAIN = "vLLM alone"
_OURS, _MODEL = "merged", "SmolLM2-135M-Instruct"
#: Who takes turns, and which of our server's vectors that is.
_TURNS = {PLAIN: None, PEER: NO_VECTOR, _OURS: served.VECTOR}
_BATCH = "batch, p50"
_LAYERS = 2
#: Short rounds: within a pair the machine is to stay as it is.
_REQUESTS_OF_A_CLIENT = 2
#: What two starts differ by is more than its noise: it needs fewer rounds.
_PAIRS_OF_A_PLAIN_ROUND = 3
_LEAST_STARTS = 2
_PLANT = "plant"
_STARTS = re.compile(r", (\d+) starts?$")


class Options(BaseOptions):
    """Of serving."""

    clients: tuple[int, ...] = Field(default=(1, 4), description="requests at once")
    starts: int = Field(default=1, ge=1, description="of either server")
    pairs: int = Field(default=18, ge=1, description="of rounds, merged and not, after each start")
    seconds: float = Field(
        default=120, ge=0, description="of each number of clients, then no pair begins; 0: all"
    )
    prompt_tokens: int = Field(default=32, ge=1, description="of a request")
    output_tokens: int = Field(default=32, ge=2, description="of a request")
    offline: int = Field(default=1, ge=0, description="pairs of runs of each offline benchmark")
    compiled: bool = Field(default=False, description="servers compile; their start takes minutes")
    graph: bool = Field(default=True, description="the compiled code is compared, too")
    plant: float = Field(
        default=0.0, ge=0, description="the share by which steps are slowed while merged"
    )

    @model_validator(mode="after")
    def _all_rounds_are_kept(self) -> Self:
        if (rounds := self.starts * self.pairs) > MOST_SAMPLES:
            raise ValueError(f"{rounds} pairs in all: at most {MOST_SAMPLES} are kept in a row")
        if self.seconds and self.starts > 1:
            raise ValueError("several starts are compared in as many pairs each: give seconds=0")
        return self


def verify(options: Options) -> None:
    """Merged and unmerged differ in the values of the merged weights, and in nothing else."""
    case = served.apart(served.small_case, options.scratch / "small")
    demand_the_offline_merge(case, options.scratch / "eager")
    if options.graph:
        first = served.apart(served.small_case, options.scratch / "first-layers", _LAYERS)
        demand_same_structure(first, options.scratch / "graph")


def demand_the_offline_merge(case: served.Case, folder: Path) -> None:
    """What is merged while loading has the structure and the weights of the merge on disk.

    Raises:
        NotVerified: It has others.
    """
    engines = {
        _OURS: {"model": str(case.task), **_merging(case), "enforce_eager": True},
        "offline": {"model": str(case.offline), "enforce_eager": True},
    }
    found = structure.structures(folder, engines)
    if differing := structure.differences(found[_OURS], found["offline"]):
        raise NotVerified(
            "merged weights", expected="those of the offline merge", got=differing,
            fix="No figure is reported.",
        )  # fmt: skip


def _merging(case: served.Case) -> dict[str, Any]:
    return {"load_format": "enchtable", "model_loader_extra_config": case.keys}


def demand_same_structure(case: served.Case, folder: Path, **engine: object) -> dict[str, Any]:
    """With and without a merge, vLLM makes the same of a model; what it makes is returned.

    Raises:
        NotVerified: Something besides the values of weights differs, or not even those.
    """
    plain = {"model": str(case.task), **engine}
    found = structure.structures(folder, {_OURS: {**plain, **_merging(case)}, PEER: plain})
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
            turns = _Turns(*_started(stack, case, options, start), options)
            for clients in options.clients:
                _rounds(turns, _ask(options, clients), start, found)
    for clients in options.clients:
        shape = f"{_MODEL}, {_count(clients, 'client')}, {_count(options.starts, 'start')}"
        for provider in _TURNS:
            yield from _rows("serve", provider, shape, found[clients, provider])
    if options.plant:
        yield row(_PLANT, _OURS, _MODEL, "", [options.plant], metric="share of a step", unit="")
    yield from _offline(case, "latency", options)
    yield from _offline(case, "throughput", options)


def _ask(options: Options, clients: int) -> Ask:
    requests = clients * _REQUESTS_OF_A_CLIENT
    return Ask(clients, requests, options.prompt_tokens, options.output_tokens)


def _started(
    stack: ExitStack, case: served.Case, options: Options, start: int
) -> tuple[Server, Server]:
    """Ours and plain vLLM, which start beside each other; who is first alternates."""
    servers = {}
    for name in _turn((PLAIN, _OURS), start):
        log = options.scratch / f"{name.replace(' ', '-')}-{start}.log"
        plugins, variables, arguments = [], {}, []
        if name == _OURS:
            plugins, arguments = ["enchtable"], case.swapping
            if options.plant:
                plugins.append(plant.NAME)
                variables = plant.variables(options.scratch / "plant")
        server = served.server(
            case.task, log, arguments, plugins=plugins, compiled=options.compiled, **variables
        )
        servers[name] = server
    served.start_together(stack, servers.values())
    merged = {name: len(server.lines("safety vector merged: ")) for name, server in servers.items()}
    if merged != {_OURS: 1, PLAIN: 0}:
        raise NotVerified("servers that merged", expected=_OURS, got=merged, fix="See their logs.")
    return servers[_OURS], servers[PLAIN]


class _Turns:
    """Whose turn it is."""

    def __init__(self, ours: Server, plain: Server, options: Options) -> None:
        self.options = options
        self._ours, self._plain = served.Swapped(ours), plain

    def of(self, name: str) -> Server:
        """The server that serves this, from now on."""
        vector = _TURNS[name]
        if vector is None:
            return self._plain
        if self.options.plant:
            share = self.options.plant if name == _OURS else 0.0
            plant.slow_down(self.options.scratch / "plant", share)
        return self._ours.serving(vector)


def _rounds(
    turns: _Turns, ask: Ask, start: int, found: dict[tuple[int, str], list[Figures]]
) -> None:
    pairs, seconds = turns.options.pairs, turns.options.seconds
    ends = time.monotonic() + seconds if seconds else float("inf")
    for pair in range(-1, pairs):  # the first warms the kernels for these shapes
        # Of an even number each is as often first, which is right after a swap.
        if pair >= LEAST_PAIRS and pair % 2 == 0 and time.monotonic() > ends:
            break
        for name in _turn(tuple(_TURNS), pair + start):
            if name == PLAIN and pair > 0 and pair % _PAIRS_OF_A_PLAIN_ROUND:
                continue
            server = turns.of(name)
            time.sleep(served.IDLE_SECONDS)
            seed = start * pairs + pair + 1
            figures = serve(server.url, server.command[2], ask, seed)
            if pair >= 0:
                found[ask.clients, name].append(figures)


def _offline(case: served.Case, kind: Offline, options: Options) -> Iterator[Row]:
    ask = _ask(options, max(options.clients))
    engine = ["--dtype", served.COMPUTES, "--max-model-len", "512", "--enforce-eager"]
    found: dict[str, list[Figures]] = defaultdict(list)
    for pair in range(options.offline):
        for name in _turn((PLAIN, _OURS), pair):
            merging = case.merging if name == _OURS else []
            made = offline(kind, case.task, ask, [*engine, *merging], options.scratch)
            found[name].append(made)
    for name, figures in found.items():
        yield from _rows(kind, name, f"{_MODEL}, a batch of {ask.clients}", figures)


def _rows(op: str, provider: str, shape: str, rounds: Sequence[Figures]) -> Iterator[Row]:
    for metric in rounds[0]:
        values = [figures[metric] for figures in rounds]
        yield row(op, provider, shape, served.DTYPE, values, metric=metric, unit=unit(metric))


def _turn(names: tuple[str, ...], number: int) -> tuple[str, ...]:
    return names if number % 2 == 0 else names[::-1]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def comparisons(rows: Sequence[Row]) -> Iterator[tuple[Row, Row, str, str]]:
    """Ours, what it is held against, their ratio within pairs, and what becomes of the claim.

    Merged against unmerged; our server, unmerged, against plain vLLM; and, offline, both at once.
    """
    found = {(row.provider, row.what): row for row in rows}
    for ours, peer in ((_OURS, PEER), (PEER, PLAIN), (_OURS, PLAIN)):
        for one in rows:
            theirs = found.get((peer, one.what))
            both = (ours, peer) == (_OURS, PLAIN) and one.op == "serve"
            if one.provider == ours and theirs is not None and not both:
                starts = _STARTS.search(one.shape)
                blocks = int(starts[1]) if starts else 1
                ratio = paired_ratio(
                    _beside(one.samples, theirs.samples, blocks),
                    theirs.samples,
                    blocks,
                    least_blocks=_LEAST_STARTS if one.op == "serve" and peer == PLAIN else 1,
                )
                claimed = peer == PEER and one.op == "serve" and one.metric in CLAIMED
                yield one, theirs, _shown(ratio), verdict(ratio, LEAST, MOST) if claimed else ""


def _beside(ours: Sequence[float], theirs: Sequence[float], blocks: int) -> Sequence[float]:
    """Of our rounds, those that have one of plain vLLM beside them, if not all have."""
    if len(ours) == len(theirs):
        return ours
    a_start = len(ours) // blocks
    return [value for i, value in enumerate(ours) if i % a_start % _PAIRS_OF_A_PLAIN_ROUND == 0]


def _shown(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f}"
    return f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"


def bounds(rows: list[Row]) -> Iterator[str]:
    """Claims that fail, or that this run cannot decide; or a planted slowdown that none found."""
    if share := next((row.p50 for row in rows if row.op == _PLANT), 0.0):
        yield from _not_found(rows, share)
        return
    for ours, _, ratio, outcome in comparisons(rows):
        if outcome in ("fails", "undecided"):
            yield (
                f"{ours.shape}: {ours.metric}: merged / unmerged {ratio}: the claim, "
                f"{LEAST} to {MOST}, {'fails' if outcome == 'fails' else 'is undecided'}"
            )


def _not_found(rows: Sequence[Row], share: float) -> Iterator[str]:
    """A step that is longer makes the time per token longer, whoever asks."""
    for ours, _, ratio, outcome in comparisons(rows):
        found = outcome == "fails" and float(ratio.split()[0]) > MOST
        if ours.metric == _PER_TOKEN and outcome and not found:
            yield (
                f"{ours.shape}: {ours.metric}: merged / unmerged {ratio}: steps were really "
                f"{share:.0%} longer, and this does not show it"
            )


def _lines(rows: Sequence[Row], peer: str) -> Iterator[list[str]]:
    for ours, theirs, ratio, outcome in comparisons(rows):
        if theirs.provider == peer and (peer == PEER or ours.metric in (*CLAIMED, _BATCH)):
            what = _STARTS.sub("", ours.shape.removeprefix(f"{_MODEL}, "))
            times = [shown(one.p50, one.unit) for one in (theirs, ours)]
            yield [f"`vllm bench {ours.op}`, {what}", ours.metric, *times, ratio, outcome]


def _table(results: Results) -> Table:
    rows = results.published("serving")
    heads = ["what", "figure", PEER, _OURS, "ratio in pairs", f"{LEAST}–{MOST}"]
    return Table(heads, list(_lines(rows, PEER)), rows)


def _plain_table(results: Results) -> Table:
    rows = results.published("serving")
    heads = ["what", "figure", PLAIN, "ours", "ratio in pairs"]
    return Table(heads, [line[:-1] for line in _lines(rows, PLAIN)], rows)


TABLES = {"serving": _table, "serving-plain": _plain_table}
