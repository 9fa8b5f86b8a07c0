"""Scope: which parameters take part.

Told from a tensor's checkpoint name, because a checkpoint has nothing else: the module
segments of the architectures that transformers and vLLM share.
"""

from __future__ import annotations

from typing import Literal, get_args

Scope = Literal["attention", "ffn", "attention+ffn", "all"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_ATTENTION = {"self_attn", "attn", "attention", "self_attention", "cross_attn", "encoder_attn"}
_FFN = {"mlp", "ffn", "feed_forward", "block_sparse_moe", "moe", "shared_expert"}


def in_scope(name: str, scope: Scope) -> bool:
    """Whether a checkpoint tensor takes part.

    ``attention`` and ``ffn`` mean the linear layers (weights, and biases where a layer has
    them) of those blocks, routers and experts included; norms inside a block do not belong.
    """
    if scope == "all":
        return True
    segments = name.split(".")
    if any("norm" in segment for segment in segments[-2:]):  # DBRX has attention in a 'norm_attn_'
        return False
    chosen = set()
    if scope in ("attention", "attention+ffn"):
        chosen |= _ATTENTION
    if scope in ("ffn", "attention+ffn"):
        chosen |= _FFN
    return not chosen.isdisjoint(segments[:-1])


def narrows(scope: Scope, within: Scope) -> bool:
    """Whether ``scope`` selects nothing that ``within`` does not."""
    return (
        within == "all"
        or scope == within
        or (within == "attention+ffn" and scope in ("attention", "ffn"))
    )
