"""Every path gives the reference's bits: CPU chunks, and Triton, interpreted or on a GPU."""

import struct

import pytest
import torch

from enchtable_kernels import Effect, fused_add
from enchtable_kernels._api import pack_keep
from enchtable_kernels.reference import fused_add_reference, unpack_keep

#: The interpreter computes with numpy, which warns of the very values these tests are about.
quiet_numpy = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [1, 7, 63, 2048, 2049, 1000 * 33, 131_072 + 5]


@pytest.fixture(scope="module")
def triton_path():
    """The Triton kernel on CPU tensors: interpreted, or on a GPU where there is one."""
    from enchtable_kernels.triton_add import fused_add_triton

    if not torch.cuda.is_available():
        return fused_add_triton

    def on_gpu(stored, delta, coefficient, out, keep_bits=None, keep_start=0):
        moved = [t.cuda() if t is not None else None for t in (stored, delta, out, keep_bits)]
        sums = fused_add_triton(*moved[:2], coefficient, *moved[2:], keep_start)
        out.copy_(moved[2])
        return sums

    return on_gpu


def make(count, stored_dtype, delta_dtype, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    stored = (torch.randn(count, generator=generator) * 0.02).to(stored_dtype)
    delta = (torch.randn(count, generator=generator) * 1e-3).to(delta_dtype)
    return stored.to(device), delta.to(device)


def reference(stored, delta, coefficient, keep_bits=None):
    out = torch.full_like(stored, float("nan"))
    sums = fused_add_reference(stored, delta, coefficient, out, keep_bits)
    return out, Effect.from_tensor(sums)


def assert_same_effect(got: Effect, expected: Effect):
    assert got.non_finite == expected.non_finite
    for name in ("intended_sq", "added_sq", "overlap"):
        # fp32 sums of blocks against fp64 sums: statistics, not weights.
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=2e-5, abs=1e-30)


def test_reference_is_multiply_add_round_and_nothing_else():
    """Against exact arithmetic on single numbers, with ties and with a product that fma would
    have rounded differently."""
    # 1 + 2^-8 lies halfway between two bf16 numbers and rounds to even; 1 + 3·2^-8 likewise.
    for stored, delta, expected in ((1.0, 2**-8, 1.0), (1.0, 3 * 2**-8, 1.015625)):
        out, _ = reference(torch.tensor([stored], dtype=torch.bfloat16), torch.tensor([delta]), 1.0)
        assert out.item() == expected
    # (1 + 2^-12)^2 rounds to 1 + 2^-11 in fp32; fma would keep the 2^-24 until after the add.
    x = 1 + 2**-12
    out, _ = reference(torch.tensor([-(1 + 2**-11)]), torch.tensor([x]), x)
    assert out.item() == 0.0


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("stored_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cpu_path_has_the_references_bits(count, stored_dtype, delta_dtype):
    stored, delta = make(count, stored_dtype, delta_dtype)
    expected, expected_effect = reference(stored, delta, 0.37)
    poisoned = torch.full_like(stored, float("nan"))
    out, sums = fused_add(stored, delta, [0.37], out=poisoned)
    assert out is poisoned
    assert torch.equal(out, expected)
    assert_same_effect(Effect.from_tensor(sums), expected_effect)


@pytest.mark.parametrize("count", [1, 63, 2048, 2049, 33_000])
@pytest.mark.parametrize("stored_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta_dtype", DTYPES, ids=str)
def test_triton_path_has_the_references_bits(triton_path, count, stored_dtype, delta_dtype):
    stored, delta = make(count, stored_dtype, delta_dtype, seed=1)
    expected, expected_effect = reference(stored, delta, 0.37)
    out = torch.full_like(stored, float("nan"))
    sums = triton_path(stored, delta, 0.37, out)
    assert torch.equal(out, expected)
    assert_same_effect(Effect.from_tensor(sums), expected_effect)


@quiet_numpy
def test_triton_rounds_every_kind_of_fp32_to_bf16_like_torch(triton_path):
    """Ties, carries into the exponent, subnormals, both zeros, the largest finite numbers."""
    bits = torch.arange(0, 2**16, dtype=torch.int64)
    patterns = torch.cat([bits << 16, (bits << 16) + 0x8000, (bits << 16) + 0x7FFF])
    values = patterns.to(torch.int32).view(torch.float32)
    values = values[torch.isfinite(values)]
    stored = torch.zeros(values.numel(), dtype=torch.bfloat16)
    expected, _ = reference(stored, values, 1.0)
    out = torch.empty_like(stored)
    triton_path(stored, values, 1.0, out)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("count", [5, 2049, 70_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_elements_keep_every_bit(triton_path, count, dtype):
    stored, delta = make(count, dtype, torch.bfloat16, seed=2)
    stored[0] = -0.0
    keep = torch.rand(count, generator=torch.Generator().manual_seed(3)) < 0.3
    keep[0] = False
    keep_bits = pack_keep(keep)
    assert torch.equal(unpack_keep(keep_bits, count), keep)
    expected, effect = reference(stored, delta, 2.0, keep_bits)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(expected[~keep].view(integers), stored[~keep].view(integers))
    assert not torch.equal(expected, stored)

    out, sums = fused_add(stored, delta, [2.0], keep_bits=keep_bits)
    assert torch.equal(out.view(integers), expected.view(integers))
    assert_same_effect(Effect.from_tensor(sums), effect)

    in_place = stored.clone()
    fused_add(in_place, delta, [2.0], keep_bits=keep_bits, out=in_place)
    assert torch.equal(in_place.view(integers), expected.view(integers))

    out = torch.empty_like(stored)
    sums = triton_path(stored, delta, 2.0, out, keep_bits)
    assert torch.equal(out.view(integers), expected.view(integers))
    assert_same_effect(Effect.from_tensor(sums), effect)


def test_a_stack_takes_a_coefficient_for_each_slice_and_masks_that_start_inside_a_byte(triton_path):
    stored, delta = make(3 * 5 * 7, torch.bfloat16, torch.bfloat16)
    stored, delta = stored.view(3, 5, 7), delta.view(3, 5, 7)
    keep = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(4)) < 0.5
    keep_bits = pack_keep(keep)
    coefficients = [0.5, 3.0, 17.0]
    out, _ = fused_add(stored, delta, coefficients, keep_bits=keep_bits)
    for i, coefficient in enumerate(coefficients):
        bits = pack_keep(keep[i])
        expected, _ = reference(stored[i].flatten(), delta[i].flatten(), coefficient, bits)
        assert torch.equal(out[i].flatten(), expected)
        through_triton = torch.empty_like(expected)
        flat = stored[i].flatten(), delta[i].flatten()
        triton_path(*flat, coefficient, through_triton, keep_bits, keep_start=i * 35)
        assert torch.equal(through_triton, expected)


def test_non_contiguous_inputs_and_in_place_output():
    stored, delta = make(64 * 48, torch.bfloat16, torch.bfloat16)
    stored, delta = stored.view(64, 48).mT, delta.view(64, 48).mT
    expected, _ = reference(stored.flatten(), delta.flatten(), 1.5)
    out, _ = fused_add(stored, delta, [1.5])
    assert torch.equal(out.flatten(), expected)
    in_place = stored.contiguous()
    fused_add(in_place, delta, [1.5], out=in_place)
    assert torch.equal(in_place, out)


def test_the_result_does_not_depend_on_threads():
    stored, delta = make(300_007, torch.bfloat16, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fused_add(stored, delta, [0.1])[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@quiet_numpy
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["stored", "delta"])
def test_non_finite_values_are_counted(triton_path, bad, where):
    stored, delta = make(5000, torch.bfloat16, torch.bfloat16)
    (stored if where == "stored" else delta)[4711] = bad
    _, sums = fused_add(stored, delta, [0.5])
    assert Effect.from_tensor(sums).non_finite == 1
    sums = triton_path(stored, delta, 0.5, torch.empty_like(stored))
    assert Effect.from_tensor(sums).non_finite == 1


@quiet_numpy
def test_overflow_on_rounding_is_counted(triton_path):
    stored = torch.full((10,), 65504.0, dtype=torch.float16)
    delta = torch.full((10,), 100.0)
    assert Effect.from_tensor(fused_add(stored, delta, [1.0])[1]).non_finite == 10
    sums = triton_path(stored, delta, 1.0, torch.empty_like(stored))
    assert Effect.from_tensor(sums).non_finite == 10


def test_effect_tells_how_much_of_a_small_update_survives():
    """With σ = 0.02 weights in bf16, an update of rms 1e-5 keeps about 0.28 of itself."""
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(1_000_000, generator=generator) * 0.02).bfloat16()
    delta = torch.randn(1_000_000, generator=generator) * 1e-5
    effect = Effect.from_tensor(fused_add(stored, delta, [1.0])[1])
    assert effect.retained_share == pytest.approx(0.28, abs=0.03)
    exact = Effect.from_tensor(fused_add(stored.float(), delta, [1.0])[1])
    assert exact.retained_share == pytest.approx(1.0, abs=1e-3)
    assert exact.relative_error < 1e-2
    assert exact.cosine == pytest.approx(1.0, abs=1e-4)


def test_effect_of_nothing():
    stored = torch.ones(4, dtype=torch.bfloat16)
    effect = Effect.from_tensor(fused_add(stored, torch.zeros(4), [1.0])[1])
    assert (effect.retained_share, effect.cosine, effect.relative_error) == (1.0, 1.0, 0.0)
    empty, sums = fused_add(torch.empty(0, 3), torch.empty(0, 3), [1.0])
    assert empty.shape == (0, 3)
    assert Effect.from_tensor(sums) == Effect()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4), torch.ones(5), [1.0]), "expected shape"),
        ((torch.ones(4).int(), torch.ones(4), [1.0]), "bf16, fp16 or fp32"),
        ((torch.ones(4), torch.ones(4).double(), [1.0]), "bf16, fp16 or fp32"),
        ((torch.ones(4, 2), torch.ones(4, 2), [1.0, 2.0]), "coefficients"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused_add(*arguments)


def test_wrong_masks_and_outputs_are_refused():
    ones = torch.ones(16)
    with pytest.raises(ValueError, match="keep_bits"):
        fused_add(ones, ones, [1.0], keep_bits=torch.ones(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="out"):
        fused_add(ones, ones, [1.0], out=torch.empty(16, dtype=torch.bfloat16))


def test_coefficient_is_rounded_to_fp32_once():
    """A float64 coefficient and its fp32 rounding give one result, on every path."""
    coefficient = 0.1
    (rounded,) = struct.unpack("f", struct.pack("f", coefficient))
    stored, delta = make(4096, torch.float32, torch.float32)
    assert torch.equal(
        fused_add(stored, delta, [coefficient])[0], fused_add(stored, delta, [rounded])[0]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("count", [*SIZES, 2**24 + 3])
@pytest.mark.parametrize("stored_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gpu_path_has_the_references_bits(count, stored_dtype, delta_dtype, masked):
    stored, delta = make(count, stored_dtype, delta_dtype, seed=5)
    keep_bits = None
    if masked:
        keep_bits = pack_keep(torch.rand(count) < 0.5)
    expected, effect = reference(stored, delta, 0.37, keep_bits)
    out = torch.full_like(stored, float("nan"), device="cuda")
    gpu_bits = keep_bits.cuda() if keep_bits is not None else None
    _, sums = fused_add(stored.cuda(), delta.cuda(), [0.37], keep_bits=gpu_bits, out=out)
    assert torch.equal(out.cpu(), expected)
    assert_same_effect(Effect.from_tensor(sums), effect)


@pytest.mark.gpu
def test_gpu_path_past_two_to_the_31_elements():
    count = 2**31 + 4099
    stored = torch.full((count,), 0.5, dtype=torch.bfloat16, device="cuda")
    delta = torch.full((count,), 0.25, dtype=torch.bfloat16, device="cuda")
    out, sums = fused_add(stored, delta, [1.0])
    assert bool((out == 0.75).all())
    assert Effect.from_tensor(sums).added_sq == pytest.approx(count / 16, rel=1e-5)
