"""A tensor that a checkpoint holds twice is merged once and passed on under both names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def under_both_names(
    merge: Callable[[NamedTensors], NamedTensors],
    stored: NamedTensors,
    second_names: Mapping[str, str],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Keep second names from a merge, and yield what came of the first under both.

    Args:
        merge: From stored tensors to merged ones, name by name.
        stored: What the checkpoint holds.
        second_names: Second name → first, as `Checkpoint.second_names`.
    """
    seconds: dict[str, list[str]] = {}
    for second, first in second_names.items():
        seconds.setdefault(first, []).append(second)
    for name, tensor in merge(pair for pair in stored if pair[0] not in second_names):
        yield name, tensor
        for second in seconds.get(name, ()):
            yield second, tensor
