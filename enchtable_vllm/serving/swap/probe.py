"""What a rank really computes with, as one digest: equal on two servers that serve the same."""

from __future__ import annotations

import torch

from enchtable_vllm.checkpoint import combine_digests, tensor_digest
from enchtable_vllm.serving import compat_swap


def served_digest(model: torch.nn.Module) -> str:
    """A digest of every weight of a model, as its layers use them."""
    served = compat_swap.served_tensors(model)
    return combine_digests({name: tensor_digest(tensor) for name, tensor in served})
