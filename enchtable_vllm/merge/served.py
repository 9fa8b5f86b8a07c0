"""What of an addition is left in the dtype in which a model is served.

VLLM converts a checkpoint that is stored in another: one in fp32, for instance, that it serves in
bf16. That rounds a second time, after the merge, and what counts is what both roundings leave.
"""

from __future__ import annotations

import torch

#: Elements looked at together.
_PIECE = 2**22


def sums_as_served(
    sums: torch.Tensor, stored: torch.Tensor, merged: torch.Tensor, served: torch.dtype | None
) -> torch.Tensor:
    """An addition's sums, of the values that are computed with.

    Args:
        sums: ``[4]`` float64, of the stored values: `enchtable_kernels.Effect`'s, in their order.
        stored: Before the addition.
        merged: After it; shape and dtype are ``stored``'s.
        served: What both are converted to; None: they are not.

    Returns:
        ``[4]`` float64, on ``merged``'s device. Of what should have been added, and of the
        elements that are not finite, it says what ``sums`` does; the overlap is with what was
        added to the stored values.
    """
    if served is None or served == stored.dtype:
        return sums
    added_sq, overlap = (
        torch.zeros((), dtype=torch.float64, device=merged.device) for _ in range(2)
    )
    pieces = (torch.split(tensor.reshape(-1), _PIECE) for tensor in (stored, merged))
    for before, after in zip(*pieces, strict=True):
        here = before.to(merged.device)
        kept = after.double() - here.double()
        shown = after.to(served).double() - here.to(served).double()
        added_sq += shown.square().sum()
        overlap += (shown * kept).sum()
    return torch.stack([sums[0].double(), added_sq, overlap, sums[3].double()])
