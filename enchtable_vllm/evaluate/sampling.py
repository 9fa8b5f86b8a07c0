"""Which prompts of a set are asked: by a digest of each, so that it depends on no order.

The same prompt falls on the same side of a split in every set and for every model, and a larger
sample holds the smaller one: runs can be paired, and tuning never sees what the test is made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from blake3 import blake3

#: Copies of a text stay on its side: see `prompts` for their names.
_COPY = re.compile(r"\A([0-9a-f]{16})-\d+\Z")

Split = Literal["all", "validation", "test"]

_Item = TypeVar("_Item")


def choose(
    items: Sequence[_Item],
    name: Callable[[_Item], str],
    *,
    limit: int | None,
    seed: int,
    split: Split = "all",
    validation_share: float = 0.5,
) -> list[_Item]:
    """A sample of one side of a split.

    Args:
        items: All of a set.
        name: An item's name, which alone decides.
        limit: At most so many.
        seed: Another one draws, and splits, otherwise.
        split: Which side, or both.
        validation_share: How much of a set is for validation.

    Returns:
        In the set's order.
    """
    if split != "all":
        wanted = split == "validation"
        items = [
            item
            for item in items
            if (_uniform("split", seed, _COPY.sub(r"\1", name(item))) < validation_share) == wanted
        ]
    if limit is None or limit >= len(items):
        return list(items)
    drawn = sorted(items, key=lambda item: _uniform("draw", seed, name(item)))[:limit]
    chosen = {name(item) for item in drawn}
    return [item for item in items if name(item) in chosen]


def _uniform(purpose: str, seed: int, name: str) -> float:
    digest = blake3(f"{purpose}:{seed}:{name}".encode()).digest(length=8)
    return int.from_bytes(digest, "big") / 2**64
