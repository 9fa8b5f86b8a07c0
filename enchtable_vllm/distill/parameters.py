"""Which parameters train: those of the scope, told by name as everywhere else."""

from __future__ import annotations

from torch import nn

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.vector import Scope, in_scope


def choose_parameters(model: nn.Module, scope: Scope) -> list[str]:
    """Let the scope's parameters train and freeze all others.

    A tied embedding is one parameter with two uses: it trains with ``all`` alone, once.

    Args:
        model: Changed in place.
        scope: Which.

    Returns:
        The names of those that train.

    Raises:
        ConfigError: There is none.
    """
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_scope(name, scope))
        if parameter.requires_grad:
            chosen.append(name)
    if not chosen:
        raise ConfigError(
            f"--scope {scope}",
            expected="parameters of this model",
            got="none of that name",
            fix="Choose another scope; 'all' always has some.",
        )
    return chosen
