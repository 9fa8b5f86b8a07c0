"""The CPU path: chunks that stay in each core's cache, every op spread over all threads.

torch splits an elementwise op of ``n`` elements statically over its threads, so the same
thread meets the same part of a chunk in each of the ops below and finds it in its own L2.
Threads are torch's own: a process bound to certain cores stays bound.
"""

from __future__ import annotations

import torch

from enchtable_kernels.reference import unpack_keep

#: fp32 scratch of 3 × 128 KiB per thread: fits the L2 of server CPUs of the last ten years.
_CHUNK_PER_THREAD = 32768


def fused_add_cpu(
    stored: torch.Tensor,
    delta: torch.Tensor,
    coefficient: float,
    out: torch.Tensor,
    keep_bits: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the package docstring. All tensors flat and of one length, on the CPU.

    Returns:
        ``[4]`` float64: intended_sq, added_sq, overlap, non_finite.
    """
    count = stored.numel()
    chunk = min(count, _CHUNK_PER_THREAD * torch.get_num_threads())
    scratch = torch.empty((3, chunk), dtype=torch.float32, device="cpu")
    c = torch.tensor(coefficient, dtype=torch.float32, device="cpu")
    intended_sq = added_sq = overlap = 0.0
    non_finite = 0
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        before, product, merged = scratch[:, : stop - start]
        before.copy_(stored[start:stop])
        product.copy_(delta[start:stop])
        product.mul_(c)
        if keep_bits is not None:
            # Chunks start at whole bytes: their size is a multiple of 8.
            bits = unpack_keep(keep_bits[start // 8 : (stop + 7) // 8], stop - start)
            product.masked_fill_(~bits, 0.0)
        torch.add(before, product, out=merged)
        if keep_bits is not None:
            # x + 0 is x, but for -0 + 0 = +0: what is left out must keep every bit.
            torch.where(bits, merged, before, out=merged)
        target = out[start:stop]
        target.copy_(merged)
        merged.copy_(target)
        added = merged.sub_(before)
        intended_sq += product.dot(product).item()
        chunk_added_sq = added.dot(added).item()
        added_sq += chunk_added_sq
        overlap += added.dot(product).item()
        if not chunk_added_sq < float("inf"):  # NaN too: only then is counting worth a pass
            non_finite += int((~torch.isfinite(target)).sum())
    return torch.tensor(
        (intended_sq, added_sq, overlap, non_finite), dtype=torch.float64, device="cpu"
    )
