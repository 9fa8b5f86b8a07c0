"""How a roll-out looks: a live table in a terminal, a JSON object on each line elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from enchtable_vllm.cli.output import out
from enchtable_vllm.errors import printable
from enchtable_vllm.fleet.documents import Served
from enchtable_vllm.fleet.events import Event, Listener

_COLOURS = {
    "swapped": "green",
    "already there": "green",
    "swapping": "yellow",
    "failed": "red",
    "rolled back": "cyan",
    "lost": "red",
}
_TARGET_STATES = {
    "swapping": "swapping",
    "swapped": "swapped",
    "failed": "failed",
    "refused": "refused",
    "rolled_back": "rolled back",
    "not_rolled_back": "lost",
}


@contextmanager
def shown(*, as_json: bool) -> Iterator[Listener]:
    """A listener that shows events on standard output."""
    if as_json:
        yield _print_line
        return
    table = _LiveTable()
    with Live(get_renderable=table.render, console=out, refresh_per_second=4) as live:
        table.console = live.console
        yield table.listen


def _print_line(event: Event) -> None:
    sys.stdout.write(json.dumps(event.to_json()) + "\n")
    sys.stdout.flush()  # whoever reads a pipe wants it now


class _LiveTable:
    """The servers, each with its state; what concerns them all scrolls by above."""

    def __init__(self) -> None:
        self.console: Console = out
        self._rows: dict[str, tuple[str, str]] = {}

    def render(self) -> Table:
        table = Table("target", "state", "serves", box=None, pad_edge=False)
        for url, (state, serves) in self._rows.items():
            colour = _COLOURS.get(state, "default")
            table.add_row(_text(url), f"[{colour}]{state}[/]", _text(serves))
        return table

    def listen(self, event: Event) -> None:
        facts = event.facts
        if event.kind == "began":
            self._rows = {str(url): ("", "") for url in _strings(facts["targets"])}
        url = facts.get("url")
        if url is not None:
            self._update(str(url), event)
        if (line := _line(event)) is not None:
            self.console.print(_text(line), highlight=False, soft_wrap=True)

    def _update(self, url: str, event: Event) -> None:
        state, serves = self._rows.get(url, ("", ""))
        if event.kind == "verified":
            state = "verified" if event.facts["to_do"] else "already there"
        state = _TARGET_STATES.get(event.kind, state)
        if isinstance(found := event.facts.get("serves"), dict):
            serves = str(Served.model_validate(found))
        self._rows[url] = (state, serves)


def _line(event: Event) -> str | None:
    """What is worth a line of its own."""
    facts = event.facts
    match event.kind:
        case "began":
            return f"rolling out '{facts['safety_vector']}'; journal: {facts['state_file']}"
        case "resumed":
            changed = len(_strings(facts["changed"]))
            return f"resuming, {facts['going']}: {changed} target(s) were changed"
        case "step":
            return f"step {facts['step']} of {facts['steps']}: {', '.join(_strings(facts['urls']))}"
        case "waiting":
            return f"waiting {facts['seconds']:g} s before the check"
        case "checked":
            faults = "; ".join(_strings(facts["faults"]))
            return "checked: all well" if facts["ok"] else f"the check failed: {faults}"
        case "interrupted":
            return f"{facts['signal']}: finishing what is in flight, then {facts['then']}"
        case "rolling_back":
            return f"rolling back {len(_strings(facts['urls']))} target(s): {facts['reason']}"
        case "refused" | "failed" | "not_rolled_back" | "warning":
            return f"{event.kind.replace('_', ' ')}: {facts['url'] or 'fleet'}: {facts['reason']}"
        case "ended":
            lines = [f"{facts['outcome']}, exit code {facts['exit_code']}"]
            lines += map(_standing, _objects(facts["targets"]))
            return "\n".join(lines)
    return None


def _standing(target: dict[str, object]) -> str:
    serves = target["serves"]
    words = Served.model_validate(serves) if serves is not None else "not known"
    reason = f" ({target['reason']})" if target["reason"] else ""
    return f"  {target['url']}: {target['state']}; serves {words}{reason}"


def _strings(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def _objects(value: object) -> list[dict[str, object]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _text(value: str) -> str:
    return escape("\n".join(map(printable, value.split("\n"))))
