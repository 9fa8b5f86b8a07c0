"""What a user would do instead of a merge, and what each token of it costs.

The same task model (SmolLM2-135M-Instruct) on the same machine, in one interleaved run: as it is;
merged while it loads; with the same merge as a LoRA adapter, of a usual rank and of the highest
that vLLM accepts; with Self-Reminder's words around each prompt; with SafeDecoding, whose expert's
weights are small and random: what it answers means nothing here, and it costs what a trained one
costs.

The delta of this benchmark is noise, of which a low rank holds the least: how much each adapter
captures is among the figures, and says nothing about the vector of a trained model.

Before that: the highest rank's adapter brings the served model nearer to the merged one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from pydantic import Field

from benchmarks import adapters, served
from benchmarks.asking import Asked, Batch, plainly, prompt, reminded, safedecoding
from benchmarks.harness import NotVerified, Row, row
from benchmarks.harness import Options as BaseOptions
from benchmarks.harness.paired import paired_ratio
from benchmarks.harness.results import Results
from benchmarks.harness.tables import Table
from benchmarks.harness.units import shown
from benchmarks.vllm_bench import unit
from enchtable_vllm.demo.server import Server

PEER = "task model"
QUICK = {"rounds": 2, "ranks": ("8",), "requests": 2, "tokens": 8}
FULL = {"rounds": 40}
_MERGED, _MODEL = "merged", "SmolLM2-135M-Instruct"
_CAPTURED = "captured energy"
_NEAREST, _EXPERT = "nearest", "expert"


class Options(BaseOptions):
    """Of the alternatives."""

    rounds: int = Field(default=4, ge=1, description="of each, in turns")
    clients: int = Field(default=2, ge=1, description="requests at once")
    requests: int = Field(default=4, ge=1, description="of a round")
    tokens: int = Field(default=24, ge=3, description="of an answer")
    ranks: tuple[int, ...] = Field(default=(16, 512), description="of adapters; vLLM knows some")


def verify(options: Options) -> None:
    """The servers serve what they are said to: merged, or nearly so through an adapter."""
    case = served.apart(served.small_case, options.scratch / "small")
    captured = served.apart(_write_adapters, case, options.scratch, options.ranks)
    (options.scratch / "captured").write_text(" ".join(map(str, captured)))
    with _servers(case, options) as servers:
        far = _distance(servers[PEER], servers[_MERGED])
        near = _distance(servers[_lora(max(options.ranks))], servers[_MERGED], _NEAREST)
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
        found = _rounds(_asked(servers, options), batch, options.rounds)
    shape = f"{_MODEL}, {options.clients} clients, {options.tokens} tokens"
    for provider, rounds in found.items():
        for metric in rounds[0]:
            values = [figures[metric] for figures in rounds]
            yield row("answer", provider, shape, "bf16", values, metric=metric, unit=unit(metric))
    captured = (options.scratch / "captured").read_text().split()
    for rank, share in zip(options.ranks, captured, strict=True):
        yield row("adapter", _lora(rank), _MODEL, "bf16", [float(share)], metric=_CAPTURED, unit="")


@contextmanager
def _servers(case: served.Case, options: Options) -> Iterator[dict[str, Server]]:
    """Of the task model, of the merged one, and one for each rank: a server has one."""
    starts: dict[str, tuple[list[str], list[str]]] = {
        PEER: ([], []),
        _MERGED: (case.merging, ["enchtable"]),
    }
    for rank in options.ranks:
        modules = [f"{n}={options.scratch / f'{n}-{rank}'}" for n in (_NEAREST, _EXPERT)]
        starts[_lora(rank)] = (
            ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", *modules],
            [],
        )
    with ExitStack() as stack:
        servers = {}
        for name, (arguments, plugins) in starts.items():
            log = options.scratch / f"{name}.log"
            server = served.server(case.task, log, arguments, plugins=plugins)
            servers[name] = stack.enter_context(server)
        yield servers


def _asked(servers: Mapping[str, Server], options: Options) -> dict[str, Asked]:
    plain, merged = (servers[name] for name in (PEER, _MERGED))
    name = plain.command[2]
    found = {PEER: Asked(plain.url, name, plainly), _MERGED: Asked(merged.url, name, plainly)}
    for rank in options.ranks:
        found[_lora(rank)] = Asked(servers[_lora(rank)].url, _NEAREST, plainly)
    found["Self-Reminder"] = Asked(plain.url, name, reminded)
    mixing = servers[_lora(min(options.ranks))]
    # Two tokens are asked for four times; an answer of one token takes two requests.
    found["SafeDecoding"] = Asked(mixing.url, name, safedecoding(_EXPERT), unanswered=(2, 1))
    return found


def _rounds(
    asked: Mapping[str, Asked], batch: Batch, rounds: int
) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
    names = list(asked)
    for number in range(-1, rounds):  # the first warms the kernels for these shapes
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(served.IDLE_SECONDS)
            figures = asked[name].round(batch, number + 1)
            if number >= 0:
                found[name].append(figures)
    return found


def _distance(one: Server, other: Server, model: str | None = None) -> float:
    """Between two models' log probabilities of the words of a few prompts: the mean difference."""
    differences = [
        abs(mine - theirs)
        for number in range(4)
        for mine, theirs in zip(
            _logprobs(one, model, prompt(number)), _logprobs(other, None, prompt(number)),
            strict=True,
        )
    ]  # fmt: skip
    return sum(differences) / len(differences)


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
