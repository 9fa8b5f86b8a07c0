"""Fused interference-aware addition: ``merged = stored + coefficient · delta``.

One pure function of (stored, delta, coefficient), written three times: plain torch
(`reference`), cache-sized chunks on all CPU threads (`cpu`), and Triton (`triton_add`).
The three give the same bits:

1. ``coefficient`` is rounded to fp32 once;
2. ``p = coefficient · fp32(delta)``: an fp32 multiply, rounded to nearest even;
3. ``s = fp32(stored) + p``: an fp32 add, rounded to nearest even, never fused with the multiply;
4. ``merged = round(s)`` to stored's own dtype, to nearest even.

Elements that a packed keep-mask leaves out stay as stored. Every path also returns an
`Effect`: what the addition did, measured in the same pass over memory.

Depends on torch and triton only.
"""

from enchtable_kernels._api import FLOAT_DTYPES, fused_add
from enchtable_kernels.effect import Effect

__all__ = ["FLOAT_DTYPES", "Effect", "fused_add"]
