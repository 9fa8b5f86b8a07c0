"""Steps that are done once: interrupted, the same command goes on with the first one missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import provenance
from enchtable_vllm.demo.server import served_dtype


class Steps:
    """Does steps, and keeps what they cost in ``costs.json``, interrupted attempts included.

    What made each is kept in ``made.json``: a later run, of another commit or on another machine,
    finds it there and is not what measured it.

    Args:
        folder: The run's.
        say: Called with a line for people.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "costs.json"
        self._folder = folder
        self._say = say
        self._within = [0.0]
        self._made_file = folder / "made.json"
        #: Result → the machine, the commit and the time that made it.
        self.made: dict[str, dict[str, str]] = (
            json.loads(self._made_file.read_text()) if self._made_file.exists() else {}
        )
        self.seconds: dict[str, float] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )

    def do(self, result: Path, make: Callable[[], object]) -> None:
        """Make a result, unless it is there.

        Args:
            result: A file or folder that appears whole, and last of all.
            make: Makes it.
        """
        name = str(result.relative_to(self._folder))
        if result.exists():
            self._say(f"  {name}: there ({self.seconds.get(name, 0.0):.0f} s when it was made)")
            return
        self._say(f"> {name} ...")
        with self.timed(name):
            make()
        made = provenance.made_now("cpu")
        self.made[name] = {**made, "device": f"{made['device']}, in {served_dtype()}"}
        self._made_file.write_text(json.dumps(self.made, indent=1))
        self._say(f"  {name}: {self.seconds[name]:.0f} s")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that something takes to what it has cost already.

        Less those of what is timed within it, so that the sum of all is what the run took.
        """
        started = time.monotonic()
        self._within.append(0.0)
        try:
            yield
        finally:
            took = time.monotonic() - started
            own = took - self._within.pop()
            self._within[-1] += took
            self.seconds[name] = round(self.seconds.get(name, 0.0) + own, 1)
            self._file.write_text(json.dumps(self.seconds, indent=1))
