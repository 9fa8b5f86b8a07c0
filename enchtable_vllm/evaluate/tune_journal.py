"""What a sweep has measured, and what the server served before it: neither may be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.evaluate.files import write_whole
from enchtable_vllm.evaluate.report import Judge
from enchtable_vllm.evaluate.tune_choice import Step
from enchtable_vllm.fleet.documents import Served

TUNE_FILE = "tune.json"
_FIXED = {"url": "server", "safety_vector": "vector", "what": "set, sample, judge or setting"}


#: Digests of task model, vector and plan, as far as the server tells.
Weights = tuple[str, str | None, str | None]


class Sweep(BaseModel):
    """What makes two sweeps the same one.

    Attributes:
        url: The server.
        safety_vector: What is swapped in.
        betas: Which β; empty for a search.
        search: Its range and how many, or None.
        what: A digest of everything that decides what is asked and how it is marked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    safety_vector: str
    betas: tuple[float, ...] = ()
    search: tuple[float, float, int] | None = None
    what: str = ""


class Tuning(BaseModel):
    """The file's content.

    Attributes:
        before: What the server served before the first swap of the first run.
        weights: What is swept, beyond its name.
        judge: Who said what is unsafe, as of the last step; None: there is none yet.
        restored: Whether it serves that again, as far as is known.
        proposed: The β with the lowest unsafe rate within the budget; None: there is none yet.
        alike: Other β within the budget whose unsafe rate the sample cannot tell from it.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    sweep: Sweep
    before: Served
    weights: Weights
    steps: list[Step] = []
    judge: Judge | None = None
    restored: bool = True
    utility_budget: float | None = None
    over_refusal_budget: float | None = None
    proposed: float | None = None
    alike: list[float] = []


def read_tuning(folder: Path, sweep: Sweep, weights: Weights) -> Tuning | None:
    """What an earlier run of the same sweep, of the same weights, left; None: nothing.

    Raises:
        ConfigError: The folder is another sweep's, or its file is damaged.
    """
    path = folder / TUNE_FILE
    if not path.exists():
        return None
    try:
        found = Tuning.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _refused(folder, "something else") from error
    # More β, or a longer search, go on with what was measured.
    differs = [words for name, words in _FIXED.items() if
               getattr(found.sweep, name) != getattr(sweep, name)]  # fmt: skip
    if found.weights != weights:
        differs.append("task model, vector or plan under the same name")
    if differs:
        raise _refused(folder, f"one with another {', '.join(differs)}")
    found.sweep = sweep
    return found


def write_tuning(folder: Path, tuning: Tuning) -> None:
    """Replace the file."""
    write_whole(folder / TUNE_FILE, tuning.model_dump_json(indent=1) + "\n")


def _refused(folder: Path, got: str) -> ConfigError:
    return ConfigError(
        f"output '{folder}'",
        expected="a new folder, or one with this very sweep to go on with",
        got=got,
        fix="Choose another output, or remove that one.",
    )
