"""Fused interference-aware addition: ``merged = stored + coefficient · delta``.

One pure function, written three times: plain torch (`reference`), a compiled loop for CPUs
(`cpu`), and Triton (`triton_add`). The three give the same bits:

1. ``coefficient`` is rounded to fp32 once;
2. an int8 delta is first multiplied by its scale: an fp32 multiply, rounded to nearest even;
3. ``p = coefficient · fp32(delta)``: an fp32 multiply, rounded to nearest even;
4. ``s = fp32(stored) + p``: an fp32 add, rounded to nearest even, never fused with a multiply;
5. ``merged = round(s)`` to stored's own dtype, to nearest even; or, with a rounding key and in
   bf16, up or down at random, with noise that depends on key and element index alone.

Elements that a packed keep-mask leaves out stay as stored. Every path also returns an
`Effect`: what the addition did, measured in the same pass over memory.

Depends on torch, triton and numba only.
"""

from enchtable_kernels._addition import SCALE_BLOCK, scales_per_row
from enchtable_kernels._api import FLOAT_DTYPES, fused_add, pack_keep
from enchtable_kernels.as_read import fused_add_as_read
from enchtable_kernels.effect import Effect
from enchtable_kernels.reference import dequantize, unpack_keep

__all__ = [
    "FLOAT_DTYPES",
    "SCALE_BLOCK",
    "Effect",
    "dequantize",
    "fused_add",
    "fused_add_as_read",
    "pack_keep",
    "scales_per_row",
    "unpack_keep",
]
