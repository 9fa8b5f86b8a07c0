"""What is added as it is read from files has the bits of what is added whole."""

import math

import pytest
import torch
from test_fused_add import DTYPES, assert_same_effect, make, make_scales, patterns

from enchtable_kernels import Effect, fused_add, fused_add_as_read
from enchtable_kernels._api import pack_keep


class Reading:
    """Hands out two tensors' bytes, which must be asked for in order."""

    def __init__(self, *tensors):
        self.tensors, self.at, self.pieces = tensors, 0, 0

    def __call__(self, first, *memories):
        assert first == self.at
        for memory, tensor in zip(memories, self.tensors, strict=True):
            at = first * tensor.element_size()
            flat = tensor.view(-1).view(torch.uint8).numpy()
            memory[:] = flat[at : at + len(memory)].data
        self.at += len(memories[0]) // self.tensors[0].element_size()
        self.pieces += 1


@pytest.mark.parametrize("shape", [(7,), (40, 96), (3, 50, 96), (9, 301)])
@pytest.mark.parametrize("delta_dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("stored_dtype", DTYPES)
@pytest.mark.parametrize("special", [False, True])
def test_what_is_added_as_it_is_read_has_the_same_bits(
    monkeypatch, shape, stored_dtype, delta_dtype, special
):
    """In pieces of some rows, of a single row that is longer, and of all there are."""
    count, rows = math.prod(shape), math.prod(shape[:-1])
    stored, delta = (t.view(shape) for t in make(count, stored_dtype, delta_dtype))
    coefficients = [0.5 + i for i in range(shape[0] if len(shape) == 3 else 1)]
    options = {}
    if delta_dtype == torch.int8:
        scales = make_scales(rows, shape[-1]).view(*shape[:-1], -(-shape[-1] // 64))
        options["scales"] = scales
    if special:
        keep = torch.rand(count, generator=torch.Generator().manual_seed(5)) < 0.5
        options |= {"keep_bits": pack_keep(keep), "rounding_key": 2**63 + 7}
    expected, sums = fused_add(stored, delta, coefficients, **options)
    for piece in (200, 300, 2**18):
        monkeypatch.setattr("enchtable_kernels.as_read.PIECE", piece)
        reading, out = Reading(stored, delta), torch.full_like(stored, 7.0)
        got = fused_add_as_read(reading, delta_dtype, coefficients, out, **options)
        assert torch.equal(patterns(out), patterns(expected))
        assert_same_effect(Effect.from_tensor(got), Effect.from_tensor(sums))
        assert reading.at == count
        assert reading.pieces >= count // max(piece, shape[-1])
