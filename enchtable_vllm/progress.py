"""How long operations report progress: a callback, so that libraries never print."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

#: Called with a tensor's name, how many steps are done, and how many there are.
Progress: TypeAlias = Callable[[str, int, int], None]


def silent(name: str, done: int, total: int) -> None:
    """Report nothing."""
