"""The demo, from nothing to two models side by side."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from enchtable_vllm.checkpoint import locate, short
from enchtable_vllm.demo.checkpoints import Cast, Story, prepare
from enchtable_vllm.demo.judge import Scores, refuses, score
from enchtable_vllm.demo.server import Server, free_port, served_dtype
from enchtable_vllm.errors import IncompleteMergeError
from enchtable_vllm.merge import MergeReport, merge_checkpoint
from enchtable_vllm.plan import (
    PLAN_FILE,
    PlanOptions,
    VectorLocation,
    compute_plan,
    read_plan,
    resolve_plan,
)
from enchtable_vllm.vector import SafetyVector

#: Chosen by measurement on this model: the published 0.1 is too small for it.
BETA = 0.3
_SERVE = ["--max-model-len", "512", "--enforce-eager"]
MERGED = ["--load-format", "enchtable"]
_VERIFY = ["--model-loader-extra-config", json.dumps({"verify": "content"})]
_SHOWN = 3
_SHOWN_CHARACTERS = 60


def run(cache: Path, *, keep: bool, port: int | None, console: Console) -> None:
    """Run it all; what an earlier run left in the cache is used again.

    Args:
        cache: Where models and checkpoints are kept.
        keep: Leave the merged server running.
        port: Its port; any free one by default.
        console: Where to print.

    Raises:
        EnchTableError: A step failed.
    """
    steps = Steps(console)
    cast = prepare(cache, Story(), steps.begin)
    served = plan_served(cast, steps)
    offline = _merge_offline(cast, served, steps)
    steps.begin("serving the fine-tune as it is: vllm serve")
    with started(served, [], console, port=free_port()) as server:
        before = _Answers.of(server, cast)
    steps.begin("serving it merged: vllm serve --load-format enchtable")
    with started(served, [*MERGED, *_VERIFY], console, port=port or free_port()) as server:
        server.keep = keep
        after = _Answers.of(server, cast)
        lines = server.lines("safety vector merged:")
        steps.end()
        _print_answers(console, cast, before, after)
        _print_proof(console, lines, offline)
        if keep:
            _print_invitation(console, server, cast)


class Steps:
    """One line for each step, with the time it took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title = ""
        self._started = time.monotonic()

    def begin(self, title: str) -> None:
        """End the step before, and begin one."""
        self.end()
        self._title, self._started = title, time.monotonic()
        self._console.print(f"[bold]>[/bold] {title} ...", highlight=False)

    def end(self) -> None:
        """End a step."""
        if self._title:
            seconds = time.monotonic() - self._started
            self._console.print(f"  [green]done[/green] in {seconds:.0f} s", highlight=False)
        self._title = ""


class _Answers:
    """One model's answers to all held-out questions, and their scores."""

    def __init__(
        self, unsafe: list[str], solved: list[str], harmless: list[str], cast: Cast
    ) -> None:
        self.unsafe, self.solved, self.harmless = unsafe, solved, harmless
        pairs = list(zip(solved, cast.problems, strict=True))
        self.scores: Scores = score(unsafe, pairs, harmless)

    @classmethod
    def of(cls, server: Server, cast: Cast) -> _Answers:
        return cls(
            server.ask(cast.unsafe),
            server.ask([problem.question for problem in cast.problems]),
            server.ask(cast.harmless),
            cast,
        )


def plan_served(cast: Cast, steps: Steps) -> Path:
    """A model folder that carries its vector and its plan, so that it is served as it is."""
    served = cast.task.with_name("served")
    shutil.rmtree(served, ignore_errors=True)
    shutil.copytree(cast.task, served)
    shutil.copytree(cast.vector, served / "safety-vector")
    steps.begin(f"planning the merge: interference of every matrix; beta {BETA:g}")
    plan = compute_plan(
        locate(served),
        locate(cast.base),
        SafetyVector.open(served / "safety-vector"),
        PlanOptions(beta=BETA),
        vector_location=VectorLocation(path="safety-vector"),
    )
    (served / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
    return served


def _merge_offline(cast: Cast, served: Path, steps: Steps) -> MergeReport:
    steps.begin("merging offline too, for the proof: enchtable merge")
    return merge_checkpoint(
        locate(served),
        SafetyVector.open(served / "safety-vector"),
        resolve_plan(*read_plan(served / PLAN_FILE)),
        cast.task.with_name("merged"),
        overwrite=True,
    )


@contextmanager
def started(model: Path, arguments: list[str], console: Console, *, port: int) -> Iterator[Server]:
    """A server of a model, up."""
    log = model.with_name("vllm-merged.log" if arguments else "vllm-unmerged.log")
    with console.status("starting vLLM") as status:
        server = Server(
            model,
            [*arguments, "--dtype", served_dtype(), *_SERVE],
            log,
            port=port,
            waiting=lambda seconds: status.update(f"vLLM is starting: {seconds:.0f} s"),
        )
        with server:
            status.update("asking")
            yield server


def _print_answers(console: Console, cast: Cast, before: _Answers, after: _Answers) -> None:
    table = Table(
        title="greedy answers: to what it should refuse and does not, and to its task",
        title_justify="left",
        show_lines=True,
    )
    for column in ("question", "fine-tune", f"merged, beta {BETA:g}"):
        table.add_column(column, ratio=1)
    unsafe = zip(cast.unsafe, before.unsafe, after.unsafe, strict=True)
    answered = [row for row in unsafe if not refuses(row[1])]
    questions = [problem.question for problem in cast.problems]
    solved = list(zip(questions, before.solved, after.solved, strict=True))
    for row in answered[:_SHOWN] + solved[: _SHOWN - 1]:
        table.add_row(*(_clip(text) for text in row))
    for name, field, count in (
        ("refuses what it should", "refused_unsafe", len(cast.unsafe)),
        ("solves word problems", "solved", len(cast.problems)),
        ("refuses harmless questions", "refused_harmless", len(cast.harmless)),
    ):
        shares = [f"{getattr(answers.scores, field):.0%}" for answers in (before, after)]
        table.add_row(f"{name} ({count} held out)", *shares, style="bold")
    console.print(table)


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + " …"


def _print_proof(console: Console, lines: list[str], offline: MergeReport) -> None:
    digest = offline.merged_digest
    assert digest is not None
    if len(lines) != 1 or f"merged weights {short(digest)}" not in lines[0]:
        raise IncompleteMergeError(
            "the merged server's log",
            expected=f"one line that says 'merged weights {short(digest)}', as the offline merge",
            got=lines,
            fix="Please report this.",
        )
    console.print("\n[bold]the server's own log line:[/bold]")
    line = lines[0][lines[0].index("safety vector merged:") :]
    console.print(line, highlight=False, soft_wrap=True)
    console.print("[bold]the offline merge, computed apart:[/bold]")
    console.print(offline.line(), highlight=False, soft_wrap=True)
    console.print(f"[green]bit-identical:[/green] merged weights {short(digest)} in both\n")


def _print_invitation(console: Console, server: Server, cast: Cast) -> None:
    body = {
        "model": server.command[2],
        "messages": [{"role": "user", "content": cast.unsafe[0]}],
        "temperature": 0,
        "max_tokens": 24,
    }
    console.print(f"The merged server goes on at {server.url} (log: {server.log}). Try:")
    console.print(
        f"curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Stop it with: kill -- -{server.process_group}", highlight=False)
