"""What a user would do instead of a merge, and what each token of it costs.

The same task model (SmolLM2-135M-Instruct) on the same machine, in one interleaved run: as it is,
and merged, by one server whose vector is swapped out and in; with the same merge as a LoRA adapter,
of a usual rank and of the highest that vLLM accepts; with Self-Reminder's words around each prompt;
with SafeDecoding, whose expert's weights are small and random: what it answers means nothing here,
and it costs what a trained one costs.

The delta of this benchmark is noise, of which a low rank holds the least: how much each adapter
captures is among the figures, and says nothing about the vector of a trained model.

Before the first round: the highest rank's adapter brings the served model nearer to the merged one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import httpx
from pydantic import Field

from benchmarks import adapters, served
from benchmarks.asking import Asked, Batch, Way, plainly, prompt, reminded, safedecoding
from benchmarks.harness import NotVerified, Row, row
from benchmarks.harness import Options as BaseOptions
from benchmarks.harness.paired import paired_ratio
from benchmarks.harness.results import Results
from benchmarks.harness.tables import Table
from benchmarks.harness.units import shown
from benchmarks.vllm_bench import unit
from enchtable_vllm.demo.server import Server
from enchtable_vllm.plan.vector_root import NO_VECTOR

PEER = "task model"
QUICK = {"rounds": 2, "ranks": ("8",), "requests": 2, "tokens": 8}
FULL = {"rounds": 40}
_MERGED, _MODEL = "merged", "SmolLM2-135M-Instruct"
_CAPTURED = "captured energy"
_NEAREST, _EXPERT = "nearest", "expert"
#: SafeDecoding takes over after two.
_FEWEST_TOKENS = 3
_TEXTS = [prompt(number) for number in range(4)]


class Options(BaseOptions):
    """Of the alternatives."""

    rounds: int = Field(default=2, ge=1, description="of each, in turns")
    clients: int = Field(default=2, ge=1, description="requests at once")
    requests: int = Field(default=2, ge=1, description="of a round")
    tokens: int = Field(default=16, ge=_FEWEST_TOKENS, description="of an answer")
    ranks: tuple[int, ...] = Field(default=(16, 512), description="of adapters; vLLM knows some")


def verify(options: Options) -> None:
    """The merge is the one that adapters approximate; what is served is looked at in `measure`."""
    case = served.apart(served.small_case, options.scratch / "small")
    captured = served.apart(_write_adapters, case, options.scratch, options.ranks)
    (options.scratch / "captured").write_text(" ".join(map(str, captured)))
    if not all(0 < share <= 1 for share in captured) or sorted(captured) != captured:
        raise NotVerified(
            "energy captured by adapters", expected="more, up to all, the higher the rank",
            got=captured, fix="No figure is reported.",
        )  # fmt: skip


def _demand_nearer(servers: _Servers, options: Options) -> None:
    """The servers serve what they are said to: merged, or nearly so through an adapter."""
    with_adapter = servers.lora[max(options.ranks)]
    merged = [_logprobs(servers.swapped.serving(served.VECTOR), None, text) for text in _TEXTS]
    plain = [_logprobs(servers.swapped.serving(NO_VECTOR), None, text) for text in _TEXTS]
    adapted = [_logprobs(with_adapter, _NEAREST, text) for text in _TEXTS]
    far, near = _distance(plain, merged), _distance(adapted, merged)
    if not 0 < near < far:
        raise NotVerified(
            "log probabilities through the adapter", expected=f"nearer to the merge than {far:.4f}",
            got=f"{near:.4f}", fix="No figure is reported.",
        )  # fmt: skip


def _write_adapters(case: served.Case, folder: Path, ranks: Sequence[int]) -> list[float]:
    for rank in ranks:
        adapters.write_random(case.task, case.offline, rank, folder / f"{_EXPERT}-{rank}")
    return [
        adapters.write_nearest(case.task, case.offline, rank, folder / f"{_NEAREST}-{rank}")
        for rank in ranks
    ]


def measure(options: Options) -> Iterator[Row]:
    """Figures of a round, in the order of the rounds: those of a round stand in the same place."""
    batch = Batch(options.clients, options.requests, options.tokens)
    with _servers(served.Case.of(options.scratch / "small"), options) as servers:
        _demand_nearer(servers, options)
        found = _rounds(_asked(servers, options), batch, options.rounds)
    shape = f"{_MODEL}, {options.clients} clients, {options.tokens} tokens"
    for provider, rounds in found.items():
        for metric in rounds[0]:
            values = [figures[metric] for figures in rounds]
            yield row(
                "answer", provider, shape, served.DTYPE, values, metric=metric, unit=unit(metric)
            )
    captured = (options.scratch / "captured").read_text().split()
    for rank, share in zip(options.ranks, captured, strict=True):
        yield row(
            "adapter", _lora(rank), _MODEL, served.DTYPE, [float(share)], metric=_CAPTURED, unit=""
        )


@dataclass(frozen=True)
class _Servers:
    """One of the task model, merged by turns, and one for each rank: a server has one."""

    swapped: served.Swapped
    lora: Mapping[int, Server]


@contextmanager
def _servers(case: served.Case, options: Options) -> Iterator[_Servers]:
    with ExitStack() as stack:

        def start(name: str, arguments: list[str], plugins: Sequence[str] = ()) -> Server:
            log = options.scratch / f"{name}.log"
            return served.server(case.task, log, arguments, plugins=plugins)

        ours = start("swapped", case.swapping, ["enchtable"])
        lora = {}
        for rank in options.ranks:
            modules = [f"{n}={options.scratch / f'{n}-{rank}'}" for n in (_NEAREST, _EXPERT)]
            adapter = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", *modules]
            lora[rank] = start(f"lora-{rank}", adapter)
        served.start_together(stack, (ours, *lora.values()))
        yield _Servers(served.Swapped(ours), lora)


#: Asks for a round, of the server that is then ready for it.
_Round = Callable[[Batch, int], dict[str, float]]


def _asked(servers: _Servers, options: Options) -> dict[str, _Round]:
    unmerged = partial(servers.swapped.serving, NO_VECTOR)
    merged = partial(servers.swapped.serving, served.VECTOR)
    adapted = {_lora(rank): partial(servers.lora.__getitem__, rank) for rank in options.ranks}
    # Two tokens are asked for four times; an answer of one token takes two requests.
    mixed = partial(_ask, adapted[_lora(min(options.ranks))], None, safedecoding(_EXPERT), (2, 1))
    return {
        PEER: partial(_ask, unmerged, None, plainly, (0, 0)),
        _MERGED: partial(_ask, merged, None, plainly, (0, 0)),
        **{name: partial(_ask, one, _NEAREST, plainly, (0, 0)) for name, one in adapted.items()},
        "Self-Reminder": partial(_ask, unmerged, None, reminded, (0, 0)),
        "SafeDecoding": mixed,
    }


def _ask(
    ready: Callable[[], Server],
    model: str | None,
    way: Way,
    unanswered: tuple[int, int],
    batch: Batch,
    number: int,
) -> dict[str, float]:
    server = ready()
    time.sleep(served.IDLE_SECONDS)
    return Asked(server.url, model or server.command[2], way, unanswered).round(batch, number)


def _rounds(
    asked: Mapping[str, _Round], batch: Batch, rounds: int
) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
    names = list(asked)
    for name in names:  # warms the kernels for these shapes
        asked[name](replace(batch, tokens=_FEWEST_TOKENS), 0)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(asked[name](batch, number + 1))
    return found


def _distance(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Between two models' log probabilities of the words of a few prompts: the mean difference."""
    pairs = zip(chain(*one), chain(*other), strict=True)
    return statistics.fmean(abs(mine - theirs) for mine, theirs in pairs)


def _logprobs(server: Server, model: str | None, text: str) -> list[float]:
    body = {"model": model or server.command[2], "prompt": text, "max_tokens": 1, "temperature": 0,
            "echo": True, "logprobs": 1}  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    told: list[float] = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:-1]
    return told


def _lora(rank: int) -> str:
    return f"LoRA, rank {rank}"


def _table(results: Results) -> Table:
    rows = results.published("alternatives")
    captured = {one.provider: f"{one.p50:.0%}" for one in rows if one.metric == _CAPTURED}
    answers = [one for one in rows if one.metric != _CAPTURED]
    peers = {one.metric: one for one in answers if one.provider == PEER}
    lines: dict[str, list[str]] = {}
    for mine in answers:
        cell = shown(mine.p50, mine.unit)
        if mine.provider != PEER:
            cell += f"; {paired_ratio(mine.samples, peers[mine.metric].samples)}"
        lines.setdefault(mine.provider, [mine.provider]).append(cell)
    for provider, line in lines.items():
        line.append(captured.get(provider, ""))
    return Table(["", *peers, "of ‖Δ‖²"], lines.values(), rows)


TABLES = {"alternatives": _table}
