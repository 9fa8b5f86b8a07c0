"""``--utility NAME`` or ``--utility NAME=FILE``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.evaluate.utility import gsm8k, humaneval, medmcqa
from enchtable_vllm.evaluate.utility.problems import ProblemSet

UTILITIES: dict[str, Callable[[Path | None], ProblemSet]] = {
    "humaneval": humaneval.read,
    "gsm8k": gsm8k.read,
    "medmcqa": medmcqa.read,
}


def read_utility(wish: str) -> ProblemSet:
    """The problems that an option names.

    Raises:
        ConfigError: There is no such set, or its problems are not here.
        PromptSetError: Its file is damaged.
    """
    name, _, file = wish.partition("=")
    read = UTILITIES.get(name)
    if read is None or (not file and "=" in wish):
        raise ConfigError(
            f"--utility {wish}",
            expected=f"{', '.join(UTILITIES)}, or one of these with =FILE",
            got="something else",
            fix="Mathematics, code and medicine are what can be marked.",
        )
    return read(Path(file) if file else None)
