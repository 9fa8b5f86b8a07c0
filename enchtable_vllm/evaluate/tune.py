"""Sweeps β on one live server: swap, evaluate, swap, and at the end back to what was served.

The server is given back whatever happens: after an error, after an interrupt, and, because the
journal remembers what was served, by the next run after a kill.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from enchtable_vllm.errors import EnchTableError, MismatchError
from enchtable_vllm.evaluate.compare import compare
from enchtable_vllm.evaluate.curve import svg
from enchtable_vllm.evaluate.faults import EvaluationError
from enchtable_vllm.evaluate.files import only_writer, write_whole
from enchtable_vllm.evaluate.report import Report, read_report
from enchtable_vllm.evaluate.tune_choice import Budget, Step, next_beta, propose
from enchtable_vllm.evaluate.tune_journal import (
    Sweep,
    Tuning,
    Weights,
    read_tuning,
    write_tuning,
)
from enchtable_vllm.evaluate.tune_page import tune_page
from enchtable_vllm.fleet.client import Client, ServerRefused
from enchtable_vllm.fleet.documents import NO_VECTOR, Goal, Served
from enchtable_vllm.fleet.exchange import (
    How,
    NotAsAsked,
    faults,
    require,
    roll_back,
    settled,
    swap,
)
from enchtable_vllm.fleet.preflight import Verified, Wish, verify

PAGE_FILE = "index.html"
_LONGEST_HISTORY = 40


@dataclass(frozen=True)
class Tune:
    """What to do.

    Attributes:
        connect: Makes a client with an admin token; each is used once.
        evaluate: Called with a folder: evaluates what is served now, into it.
        sweep: Which β, of which vector.
        budget: What safety may cost.
        keep: Leave the server on the proposed β.
        how: Of the swaps.
        announce: Told what happens, a line each.
    """

    connect: Callable[[], Client]
    evaluate: Callable[[Path], Report]
    sweep: Sweep
    budget: Budget
    keep: bool
    how: How
    announce: Callable[[str], None]


def tune(wanted: Tune, output: Path) -> Tuning:
    """Sweep, or go on sweeping.

    Args:
        wanted: What to do.
        output: The folder of the sweep: a report for each step, the journal, the page.

    Returns:
        What was measured, and what is proposed.

    Raises:
        ConfigError: The folder is another sweep's, or in use.
        MismatchError: The server cannot serve that vector.
        NotAsAsked: Somebody else changes the server.
        EvaluationError: A step did not come to its end, or the server could not be given back.
    """
    with only_writer(output, "sweeping"):
        tuning = _begin(wanted, output)
        try:
            _sweep(wanted, tuning, output)
            _conclude(wanted, tuning, output)
            if wanted.keep and tuning.proposed is not None:
                wanted.announce(f"the server stays on beta {tuning.proposed:g}")
                _serve(wanted, tuning, tuning.proposed, output)
                tuning.restored = True  # as wanted
                write_tuning(output, tuning)
        finally:
            if not tuning.restored:
                _give_back(wanted, tuning, output)
        return tuning


def _begin(wanted: Tune, output: Path) -> Tuning:
    served = asyncio.run(_status(wanted))
    weights = asyncio.run(_check(wanted))
    tuning = read_tuning(output, wanted.sweep, weights)
    if tuning is None:
        tuning = Tuning(sweep=wanted.sweep, before=served, weights=weights)
    elif tuning.restored:
        tuning.before = served
    elif not served.same(tuning.before) and served.safety_vector not in (
        NO_VECTOR,
        wanted.sweep.safety_vector,
    ):
        raise NotAsAsked(
            f"server {wanted.sweep.url}",
            expected=f"what an interrupted sweep left there, or found there ({tuning.before})",
            got=f"{served}",
            fix="Somebody else changed it: agree, then sweep with another output.",
        )
    if tuning.restored:
        asyncio.run(_demand_way_back(wanted, tuning.before))
    tuning.utility_budget = wanted.budget.utility
    tuning.over_refusal_budget = wanted.budget.over_refusal
    write_tuning(output, tuning)
    return tuning


def _sweep(wanted: Tune, tuning: Tuning, output: Path) -> None:
    while (following := _next(wanted, tuning)) is not None:
        (beta,) = following
        name = "no-vector" if beta is None else f"beta-{beta:g}"
        wanted.announce("no vector" if beta is None else f"beta {beta:g}")
        _serve(wanted, tuning, beta, output)
        report = wanted.evaluate(output / name)
        tuning.steps.append(_step(beta, name, report))
        tuning.judge = report.judge
        write_tuning(output, tuning)


def _next(wanted: Tune, tuning: Tuning) -> tuple[float | None] | None:
    """What to measure next, None: nothing. First no vector: what utility is compared with."""
    tried = {step.beta for step in tuning.steps}
    if None not in tried:
        return (None,)
    if wanted.sweep.search is not None:
        steps = _wanted(wanted.sweep, tuning.steps)
        found = next_beta(steps, wanted.budget, *wanted.sweep.search)
        return None if found is None else (found,)
    return next(((beta,) for beta in wanted.sweep.betas if beta not in tried), None)


def _serve(wanted: Tune, tuning: Tuning, beta: float | None, output: Path) -> None:
    """Have the server serve a step's weights."""
    vector = NO_VECTOR if beta is None else wanted.sweep.safety_vector
    tuning.restored = False  # before the request leaves: its answer may be lost
    write_tuning(output, tuning)
    asyncio.run(_swap(wanted, vector, beta))


async def _status(wanted: Tune) -> Served:
    async with wanted.connect() as client:
        return Served.of(await settled(client, wanted.how))


async def _check(wanted: Tune) -> Weights:
    """Before the first swap: whether the server can serve the vector at all; and which it is."""
    async with wanted.connect() as client:
        one = await _verified(client, wanted, wanted.sweep.safety_vector, None, dry_run=True)
    return one.status.task_model.fingerprint, one.goal.vector_digest, one.goal.plan_digest


async def _demand_way_back(wanted: Tune, before: Served) -> None:
    """Before the first swap: the server can be asked, by name, for what it serves now.

    It may not be: it may have been started with a plan of its own, or from another folder.
    """
    got: object
    async with wanted.connect() as client:
        try:
            tried = await client.swap(
                before.safety_vector,
                beta=before.beta,
                dry_run=True,
                expected_epoch=before.epoch,
                timeout_seconds=wanted.how.timeout_seconds,
            )
        except ServerRefused as error:
            if error.code not in ("unknown_vector", "no_plan"):
                raise
            got = error
        else:
            if Goal.of(before).met_by(tried.active):
                return
            got = "another vector or plan under that name"
    raise MismatchError(
        f"server {wanted.sweep.url}",
        expected=f"to be able to give it back what it serves ({before}), by that name",
        got=got,
        fix="Swap it to a vector of its root, or of a repository that it allows, first "
        "('enchtable swap'), then tune.",
    )


async def _swap(wanted: Tune, vector: str, beta: float | None) -> None:
    async with wanted.connect() as client:
        by_list = not (vector.startswith("@") or "/" in vector)
        one = await _verified(client, wanted, vector, beta, dry_run=not by_list)
        goal = one.goal if beta is None else one.goal.model_copy(update={"beta": beta})
        await swap(client, vector, beta, goal, one.served, wanted.how)


async def _verified(
    client: Client, wanted: Tune, vector: str, beta: float | None, *, dry_run: bool
) -> Verified:
    wish = Wish(vector, beta, dry_run=dry_run, timeout_seconds=wanted.how.timeout_seconds)
    verified, refusals = await verify([client], wish)
    if refusals:
        raise MismatchError(
            f"server {client.target.url}",
            expected=f"one that can serve '{vector}'",
            got=refusals[0].reason,
            fix="See 'enchtable status', and the server's vector root.",
        )
    (one,) = verified.values()
    return one


def _step(beta: float | None, folder: str, report: Report) -> Step:
    unsafe, worst, utility = (
        report.pooled("safety"),
        report.worst("safety"),
        report.pooled("utility"),
    )
    assert unsafe is not None
    assert worst is not None
    assert utility is not None
    return Step(
        beta=beta,
        folder=folder,
        unsafe=unsafe,
        worst=worst,
        utility=utility,
        over_refusal=report.pooled("harmless"),
    )


def _conclude(wanted: Tune, tuning: Tuning, output: Path) -> None:
    best = propose(_wanted(wanted.sweep, tuning.steps), wanted.budget)
    tuning.proposed = best.beta if best is not None else None
    tuning.alike = [] if best is None else _alike(wanted, tuning, best, output)
    write_tuning(output, tuning)
    write_whole(output / PAGE_FILE, tune_page(tuning, svg(tuning.steps, tuning.proposed)))


def _wanted(sweep: Sweep, steps: Sequence[Step]) -> list[Step]:
    """Those that this sweep asks for: an earlier run of it may have measured others."""
    if sweep.search is None:
        return [step for step in steps if step.beta is None or step.beta in sweep.betas]
    low, high, _ = sweep.search
    # What was rounded to three digits may lie beyond its own bound.
    return [step for step in steps if step.beta is None or low * 0.99 <= step.beta <= high * 1.01]


def _alike(wanted: Tune, tuning: Tuning, best: Step, output: Path) -> list[float]:
    """Other β within the budget that the sample cannot tell from the best, on the same prompts."""
    without = next(step for step in tuning.steps if step.beta is None)
    first = (best.folder, read_report(output / best.folder))
    found = []
    for step in _wanted(wanted.sweep, tuning.steps):
        if step.beta in (None, best.beta) or not wanted.budget.allows(step, without):
            continue
        other = (step.folder, read_report(output / step.folder))
        if compare([first, other]).rows[1].differences["safety"].p >= 0.05:
            found.append(float(step.beta or 0.0))
    return sorted(found)


def _give_back(wanted: Tune, tuning: Tuning, output: Path) -> None:
    with _undisturbed():
        wanted.announce(f"the server goes back to {tuning.before}")
        try:
            asyncio.run(_back(wanted, tuning.before))
        except EnchTableError as error:
            vector, beta = tuning.before.safety_vector, tuning.before.beta
            also = f" --beta {beta}" if beta is not None else ""
            raise EvaluationError(
                f"server {wanted.sweep.url}",
                expected=f"it to serve again what it did ({tuning.before})",
                got=error,
                fix=f"It may serve an unsafe merge: enchtable swap --url {wanted.sweep.url} "
                f"--safety-vector {vector}{also}",
            ) from error
        tuning.restored = True
        write_tuning(output, tuning)


async def _back(wanted: Tune, before: Served) -> None:
    """By a swap; where that name leads elsewhere by now, by the server's history, step by step."""
    async with wanted.connect() as client:
        status = await settled(client, wanted.how)
        if not faults(status, Goal.of(before)):
            return
        served = Served.of(status)
        try:
            await swap(
                client, before.safety_vector, before.beta, Goal.of(before), served, wanted.how
            )
        except (ServerRefused, NotAsAsked):
            for _ in range(_LONGEST_HISTORY):
                status = await settled(client, wanted.how)
                served = Served.of(status)
                if served.same(before):
                    require(client, status, Goal.of(before))  # on every rank, and to everybody
                    return
                await roll_back(client, served, wanted.how)
            raise


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not leave the server with whatever was being measured."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {number: signal.signal(number, signal.SIG_IGN)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}  # fmt: skip
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
