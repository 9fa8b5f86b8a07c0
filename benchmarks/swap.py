"""Swapping under load, against a restart of the same server and against vLLM's own reload.

A real server of the small real model (SmolLM2-135M-Instruct) with two attention-scope vectors;
four clients ask for completions all the time, and one reads its answers token by token. Swapped
back and forth: how long generation takes to stop (the step that it is in), how long it then stands
still, how long staging takes meanwhile and the whole swap; and how long a restart is away, from the
signal that ends the old server to the new one's first answer; and how long a server of plain vLLM
stands still while it reads the same weights anew, all of them, from a merge that was written to
disk. For each, the longest that the stream waited for a token from its begin to its end, which is
what a client sees, the requests read anew among it; and how many requests of those clients were
lost, who ask again after a second. ``soak`` goes on to as many swaps, and sees how memory and
requests fare.

The weights that the ranks compute with are read back, and must be those of a fresh start on
either vector; the reloaded server must answer as those fresh starts do; every answer must be
whole, and come from one vector or the other.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from benchmarks import swap_reload, swap_server
from benchmarks.harness import NotVerified, Row, row
from benchmarks.harness import Options as BaseOptions
from benchmarks.harness.interval import ratio
from benchmarks.harness.results import Results
from benchmarks.harness.tables import Table
from benchmarks.harness.target import Target, tally
from benchmarks.harness.units import shown
from benchmarks.served import DTYPE, apart
from benchmarks.swap_server import NAMES, Load, SwapServer, served, under_load
from enchtable_vllm.demo.server import free_port

PEER, RELOAD = "restart", "reload by plain vLLM"
QUICK = {"swaps": 4, "restarts": 1, "reloads": 2}
FULL = {"soak": 500, "restarts": 3, "swaps": 20, "reloads": 20}
MOST_PAUSED_SECONDS = 0.15
MOST_OF_A_RESTART = 1 / 100
MOST_GROWTH = 0.03
_OURS, _SHAPE = "enchtable", "SmolLM2-135M-Instruct, attention"
#: What an answer says it took → the metric; and what a client saw.
_ANSWERED = {
    "pausing": "pausing",
    "paused": "standing still",
    "staging": "staging",
    "swap": "whole",
}
_STOOD_STILL = _ANSWERED["paused"]
_WAIT, _LISTENED = "wait", "wait of a stream"
_SETTLED_AFTER = 5
_WARM_UP_SECONDS = 60.0
#: The clients' first answers have come by then.
_BEFORE_A_RESTART_SECONDS = 3.0
_BETWEEN_SWAPS_SECONDS = 1.0


class Options(BaseOptions):
    """Of swapping."""

    swaps: int = Field(default=12, ge=1, description="that are timed")
    restarts: int = Field(default=1, ge=1, description="that are timed")
    reloads: int = Field(default=5, ge=1, description="by vLLM's own means, that are timed")
    soak: int = Field(default=0, description="swaps after those, for memory; 500 is the claim")

    @field_validator("restarts")
    @classmethod
    def _the_last_is_on_the_other_vector(cls, restarts: int) -> int:
        if restarts % 2 == 0:
            raise ValueError("an odd number: weights of both vectors are seen after a fresh start")
        return restarts


def verify(options: Options) -> None:
    """Make the models; servers show that they are right before anything is told of their speed."""
    # In a process of its own: it imports what this one needs no more.
    task = apart(swap_server.make_root, options.scratch)
    (options.scratch / "task").write_text(str(task))


def _compare(server: SwapServer, fresh: dict[str, Any]) -> None:
    if fresh[NAMES[0]] == fresh[NAMES[1]]:
        raise NotVerified("the two vectors", expected="two sets of weights", got="one", fix="")
    for name in NAMES:
        server.swap(name)
        if server.weights() != fresh[name]:
            raise NotVerified(
                f"after a swap to '{name}'",
                expected="the weights of a fresh start",
                got="others",
                fix="No speed is reported.",
            )


def measure(options: Options) -> Iterator[Row]:
    """Seconds of swaps and restarts; memory, if it is soaked."""
    task = Path((options.scratch / "task").read_text())
    with ExitStack() as last:
        port = free_port()
        server = last.enter_context(served(task, options.scratch, NAMES[0], port))
        fresh = {NAMES[0]: server.weights()}
        told = {NAMES[0]: swap_server.logprobs(server)}
        away, waits = [], []
        with under_load(server) as load:
            for number in range(1, options.restarts + 1):
                time.sleep(_BEFORE_A_RESTART_SECONDS)
                began = time.perf_counter()
                last.close()
                server = last.enter_context(
                    served(task, options.scratch, NAMES[number % len(NAMES)], port)
                )
                ended = time.perf_counter()
                away.append(ended - began)
                waits.append(_heard(load, began, ended))
        fresh[NAMES[1]], told[NAMES[1]] = server.weights(), swap_server.logprobs(server)
        _compare(server, fresh)
        yield row("swap", PEER, _SHAPE, DTYPE, away, metric=_STOOD_STILL)
        yield row("swap", PEER, _SHAPE, DTYPE, waits, metric=_LISTENED)
        yield from _requests(PEER, _count(options.restarts, "restart"), load)
        with under_load(server) as load:
            yield from _swaps(server, options.swaps, load)
            if options.soak:
                yield from _soak(server, options.soak, load)
        _demand_whole(load)
        yield from _requests(_OURS, _count(options.swaps + options.soak, "swap"), load)
    yield from _reloads(options, told)


def _heard(load: Load, began: float, ended: float) -> float:
    """How long the stream waited for a token meanwhile; until the first after it has come."""
    load.hear(ended)
    silence = load.silence(began, ended)
    if silence is None:
        raise NotVerified("a stream", expected="tokens, before and after", got="none", fix="")
    return silence


def _requests(provider: str, during: str, load: Load) -> Iterator[Row]:
    for metric, count in (("answered", load.answers), ("lost", len(load.failures))):
        yield row("requests", provider, f"{_SHAPE}, {during}", "", [count], metric=metric, unit="")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _reloads(options: Options, expected: Mapping[str, list[float]]) -> Iterator[Row]:
    with swap_reload.reloading(options.scratch) as server:
        told = swap_reload.answers(server, options.scratch)
        if told != expected or told[NAMES[0]] == told[NAMES[1]]:
            raise NotVerified(
                "answers after vLLM's own reload", expected=expected, got=told,
                fix="Its speed is not reported.",
            )  # fmt: skip
        times, load = swap_reload.timed(server, options.scratch, options.reloads)
    _demand_no_failure(load)
    pausing, paused, began, ended = zip(*times, strict=True)
    waits = [_heard(load, *moments) for moments in zip(began, ended, strict=True)]
    yield row("swap", RELOAD, _SHAPE, DTYPE, pausing, metric=_ANSWERED["pausing"])
    yield row("swap", RELOAD, _SHAPE, DTYPE, paused, metric=_STOOD_STILL)
    yield row("swap", RELOAD, _SHAPE, DTYPE, waits, metric=_LISTENED)
    yield from _requests(RELOAD, _count(options.reloads, "reload"), load)


def _swaps(server: SwapServer, count: int, load: Load) -> Iterator[Row]:
    for name in NAMES:  # whatever is made once is made
        server.swap(name)
    found: dict[str, list[float]] = {key: [] for key in (*_ANSWERED, _WAIT)}
    swapping: list[tuple[float, float]] = []
    for number in range(count):
        began = time.perf_counter()
        answer = server.swap(NAMES[number % 2])
        answered = time.perf_counter()
        if answer["outcome"] != "swapped":
            raise NotVerified("swap", expected="swapped", got=answer["outcome"], fix="See its log.")
        for key in _ANSWERED:
            found[key].append(answer[f"{key}_seconds"])
        found[_WAIT].append(_heard(load, began, answered))
        swapping.append((began, answered))
        time.sleep(_BETWEEN_SWAPS_SECONDS)
    _demand_whole(load)
    for key, metric in {**_ANSWERED, _WAIT: _LISTENED}.items():
        if found[key]:
            yield row("swap", _OURS, _SHAPE, DTYPE, found[key], metric=metric)
    usual = [
        after - before
        for before, after in itertools.pairwise(load.heard)
        if not any(before < ended and after > began for began, ended in swapping)
    ]
    yield row("swap", "no swap", _SHAPE, DTYPE, usual, metric=_LISTENED)


def _demand_no_failure(load: Load) -> None:
    if load.failures:
        got = f"{len(load.failures)} that are not, first: {load.failures[0]}"
        raise NotVerified("answers", expected="whole ones", got=got, fix="No speed is reported.")


def _demand_whole(load: Load) -> None:
    _demand_no_failure(load)
    if len(load.versions) != len(NAMES):
        raise NotVerified("answers", expected="two versions", got=len(load.versions), fix="")


def _soak(server: SwapServer, swaps: int, load: Load) -> Iterator[Row]:
    """Memory when it has settled, and at the end."""
    load.of_any_length = True
    time.sleep(_WARM_UP_SECONDS)
    for number in range(swaps):
        server.swap(NAMES[number % 2])
        if number + 1 == _SETTLED_AFTER:
            settled = server.settled_bytes()
    for when, value in (
        (f"after {_SETTLED_AFTER} swaps", settled),
        ("at the end", server.settled_bytes()),
    ):
        yield row("soak", _OURS, f"{_SHAPE}, {when}", DTYPE, [value], metric="memory", unit="B")


def bounds(rows: list[Row]) -> Iterator[str]:
    """What is promised of a swap and was missed."""
    target = _promised(rows)
    if target.kept is False:
        yield f"paused {target.missed}"
    memory = [r.p50 for r in rows if r.op == "soak"]
    if memory and abs(memory[1] / memory[0] - 1) > MOST_GROWTH:
        yield f"memory grew by {memory[1] / memory[0] - 1:+.1%}: at most {MOST_GROWTH:.0%}"


def _promised(rows: Sequence[Row]) -> Target:
    """Of how long a server stands still for a swap."""
    paused, restart = (
        next(r.p50 for r in rows if r.metric == _STOOD_STILL and r.provider == provider)
        for provider in (_OURS, PEER)
    )
    most = min(MOST_PAUSED_SECONDS, restart * MOST_OF_A_RESTART)
    return Target(f"≤ {shown(most, 's')}", paused <= most, shown(paused, "s"))


def _table(results: Results) -> Table:
    published = results.published("swap")
    rows = [row for row in published if row.unit]
    peers = {row.what: row for row in rows if row.provider == PEER}
    promised = _promised(rows)
    lines = [
        [
            f"{row.op}: {row.metric}" + row.shape.removeprefix(_SHAPE),
            row.provider,
            shown(row.p50, row.unit),
            str(ratio(row, peers[row.what])) if row.what in peers and row.provider != PEER else "",
            str(promised) if (row.provider, row.metric) == (_OURS, _STOOD_STILL) else "",
        ]
        for row in rows
    ]
    lines += _lost([row for row in published if row.op == "requests"])
    heads = ["what", "by", "median", "÷ restart", "target"]
    return Table(heads, lines, published, tally([promised]))


def _lost(rows: Sequence[Row]) -> Iterator[list[str]]:
    answered = {(row.provider, row.shape): row.p50 for row in rows if row.metric == "answered"}
    for lost in rows:
        if lost.metric == "lost":
            asked = lost.p50 + answered[lost.provider, lost.shape]
            during = lost.shape.removeprefix(f"{_SHAPE}, ")
            shares = f"{lost.p50:,.0f} of {asked:,.0f}"
            yield [f"requests lost: {during}", lost.provider, shares, "", ""]


TABLES = {"swap": _table}
