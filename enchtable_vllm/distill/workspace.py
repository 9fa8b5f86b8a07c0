"""What a distillation in the making has reached, so that an interruption costs little.

A hidden folder beside the vector to be: Trainer's checkpoints, then the surrogate and its loss
curve. Both are models made to be unsafe: the folder is for its owner alone, and goes when the
vector is written or refused. It counts only for the very inputs that it was begun with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from enchtable_vllm.distill.training import Step, newest_checkpoint
from enchtable_vllm.errors import ConfigError

#: The input that may be another on another day.
EXAMPLES = "examples"
_INPUTS = "inputs.json"
_CURVE = "curve.json"  # written last: the surrogate beside it is whole


class Workspace:
    """One such folder.

    Args:
        out: Where the vector will be. Its transaction's lock keeps other processes away.
    """

    def __init__(self, out: Path) -> None:
        out = out.absolute()
        self.path = out.with_name(f".{out.name}.training")
        self.surrogate = self.path / "surrogate"

    def begin(self, inputs: Mapping[str, object], *, resume: bool) -> str:
        """Take over what was done for the same inputs; forget all else.

        Args:
            inputs: Whatever decides the result.
            resume: False: begin anew.

        Returns:
            What is taken over, or why nothing is, for people; nothing if this is a beginning.

        Raises:
            ConfigError: The folder cannot be made.
        """
        text = json.dumps(inputs, indent=2, sort_keys=True)
        stored = self.path / _INPUTS
        anew = ""
        try:
            others = self._others(text)
            if others is None or others or not resume:
                if others and resume:
                    anew = f"begun anew: an interrupted run was of other {', '.join(others)}"
                self.remove()
                self.path.mkdir(mode=0o700, parents=True)
                stored.write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"'{self.path}'",
                expected="a folder that can be written, for what is needed to resume",
                got=error,
                fix="Choose another output, or remove the folder.",
            ) from error
        if self.curve() is not None:
            return "resuming: the surrogate is trained"
        newest = newest_checkpoint(self.path)
        return f"resuming: training goes on from {Path(newest).name}" if newest else anew

    def _others(self, text: str) -> list[str] | None:
        """Which inputs are not those that it was begun with; None: it was not begun.

        What was trained is trained: tokens that a template makes of today's date are none then.
        """
        stored = self.path / _INPUTS
        if not stored.is_file():
            return None
        try:
            before, now = json.loads(stored.read_text(encoding="utf-8")), json.loads(text)
        except ValueError:  # the process was killed while it wrote
            return None
        names = sorted({*before, *now})
        others = [name for name in names if before.get(name) != now.get(name)]
        return [] if others == [EXAMPLES] and self.curve() is not None else others

    def finish(self, curve: Sequence[Step]) -> None:
        """The surrogate is there: checkpoints are needed no more."""
        partial = self.path / f"{_CURVE}.partial"
        partial.write_text(json.dumps([asdict(step) for step in curve]), encoding="utf-8")
        partial.rename(self.path / _CURVE)
        for checkpoint in self.path.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)

    def curve(self) -> list[Step] | None:
        """The loss curve of a training that came to its end."""
        path = self.path / _CURVE
        if not path.is_file():
            return None
        return [Step(**row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def remove(self) -> None:
        """Everything of it.

        Raises:
            ConfigError: Something is left: a model made to be unsafe must not stay unnoticed.
        """
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
        except OSError as error:
            raise ConfigError(
                f"'{self.path}'",
                expected="a folder that can be removed: it holds a model made to be unsafe",
                got=error,
                fix="Remove it yourself.",
            ) from error
