"""Every path gives the reference's bits: the CPU loop, and Triton, interpreted or on a GPU."""

import dataclasses
import struct
import subprocess
import sys

import pytest
import torch

from enchtable_kernels import Effect, fused_add
from enchtable_kernels._addition import Addition
from enchtable_kernels._api import pack_keep
from enchtable_kernels.cpu import fused_add_cpu
from enchtable_kernels.reference import (
    dequantize,
    fused_add_reference,
    noise,
    round_stochastic,
    unpack_keep,
)

#: The interpreter computes with numpy, which warns of the very values these tests are about.
quiet_numpy = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [1, 7, 63, 2048, 2049, 1000 * 33, 131_072 + 5]


def on_triton(addition):
    """The Triton kernel on CPU tensors: interpreted, or on a GPU where there is one."""
    from enchtable_kernels.triton_add import fused_add_triton

    if not torch.cuda.is_available():
        return fused_add_triton(addition)
    moved = {
        field.name: value.cuda()
        for field in dataclasses.fields(addition)
        if isinstance(value := getattr(addition, field.name), torch.Tensor)
    }
    sums = fused_add_triton(dataclasses.replace(addition, **moved))
    addition.out.copy_(moved["out"])
    return sums.cpu()


PATHS = [pytest.param(fused_add_cpu, id="cpu"), pytest.param(on_triton, id="triton")]
every_path = pytest.mark.parametrize("path", PATHS)


def make(count, stored_dtype, delta_dtype, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    stored = (torch.randn(count, generator=generator) * 0.02).to(stored_dtype)
    if delta_dtype == torch.int8:
        delta = torch.randint(-127, 128, (count,), generator=generator, dtype=torch.int8)
    else:
        delta = (torch.randn(count, generator=generator) * 1e-3).to(delta_dtype)
    return stored.to(device), delta.to(device)


def make_scales(rows, row_length, seed=9):
    """Positive, of very different sizes, one of them zero."""
    count = rows * -(-row_length // 64)
    scales = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 1e-5 + 1e-7
    scales[count // 2] = 0.0
    return scales


def run(path, stored, delta, coefficient, **more):
    """(merged, effect) of one path, the output poisoned before."""
    out = torch.full_like(stored, float("nan"))
    sums = path(Addition(stored, delta, out, coefficient, **more))
    return out, Effect.from_tensor(sums)


def reference(stored, delta, coefficient, **more):
    return run(fused_add_reference, stored, delta, coefficient, **more)


def patterns(tensor):
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def assert_same(path, stored, delta, coefficient, **more):
    """The path's bits are the reference's, and its sums agree."""
    expected, effect = reference(stored, delta, coefficient, **more)
    out, got = run(path, stored, delta, coefficient, **more)
    assert torch.equal(patterns(out), patterns(expected))
    assert_same_effect(got, effect)
    return out


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


@every_path
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("stored_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta_dtype", DTYPES, ids=str)
def test_every_path_has_the_references_bits(path, count, stored_dtype, delta_dtype):
    stored, delta = make(count, stored_dtype, delta_dtype)
    assert_same(path, stored, delta, 0.37)


def every_kind_of_fp32(step):
    """Ties, carries into the exponent, subnormals, both zeros, the largest finite numbers."""
    bits = torch.arange(0, 2**32, 2**step, dtype=torch.int64)
    half = 2 ** (step - 1)
    found = torch.cat([bits, bits + half, bits + half - 1, bits + half + 1, bits + 2**step - 1])
    values = found.to(torch.uint32).view(torch.float32)
    return values[torch.isfinite(values)]


@quiet_numpy
@every_path
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 16), (torch.float16, 13)], ids=str)
def test_every_kind_of_fp32_rounds_like_torch(path, dtype, step):
    values = every_kind_of_fp32(step)
    if path is not fused_add_cpu:  # the interpreter is slow, and a step of it is as good
        values = values[:: 1 if step == 16 else 7].contiguous()
    zeros = torch.zeros(values.numel(), dtype=dtype)
    out, _ = run(path, zeros, values, 1.0)
    assert torch.equal(patterns(out), patterns((values + 0.0).to(dtype)))


@every_path
def test_every_half_is_widened_exactly(path):
    """Each finite fp16 and bf16 pattern, added to nothing, comes back with its own bits."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16).to(torch.uint16).view(dtype)
        every = every[torch.isfinite(every)].contiguous()
        out, effect = run(path, every, torch.zeros_like(every), 1.0)
        assert torch.equal(patterns(out + 0.0), patterns(every + 0.0))  # -0 + 0 is +0
        assert effect.non_finite == 0


@every_path
@pytest.mark.parametrize(("rows", "row_length"), [(1, 1), (7, 64), (33, 192), (5, 63), (9, 1000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_with_scales_is_two_fp32_multiplies(path, rows, row_length, dtype):
    stored, delta = make(rows * row_length, dtype, torch.int8)
    scales = make_scales(rows, row_length)
    out = assert_same(path, stored, delta, 37.0, scales=scales, row_length=row_length)
    dense = dequantize(delta.view(rows, row_length), scales.view(rows, -1)).flatten()
    assert torch.equal(out, reference(stored, dense, 37.0)[0])
    blocks = torch.arange(rows * row_length) % row_length // 64
    by_hand = scales.view(rows, -1).gather(1, blocks.view(rows, -1)) * delta.view(rows, -1).float()
    assert torch.equal(dense, by_hand.flatten())


@every_path
@pytest.mark.parametrize("count", [5, 2049, 70_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [None, 11], ids=["nearest", "stochastic"])
def test_masked_out_elements_keep_every_bit(path, count, dtype, key):
    stored, delta = make(count, dtype, torch.bfloat16, seed=2)
    stored[0] = -0.0
    keep = torch.rand(count, generator=torch.Generator().manual_seed(3)) < 0.3
    keep[0] = False
    keep_bits = pack_keep(keep)
    assert torch.equal(unpack_keep(keep_bits, 0, count), keep)
    out = assert_same(path, stored, delta, 2.0, keep_bits=keep_bits, rounding_key=key)
    assert torch.equal(patterns(out)[~keep], patterns(stored)[~keep])
    assert not torch.equal(out, stored)


def test_masks_work_in_place():
    stored, delta = make(2049, torch.bfloat16, torch.bfloat16)
    keep_bits = pack_keep(torch.rand(2049, generator=torch.Generator().manual_seed(3)) < 0.3)
    expected, _ = reference(stored, delta, 2.0, keep_bits=keep_bits)
    fused_add(stored, delta, [2.0], keep_bits=keep_bits, out=stored)
    assert torch.equal(patterns(stored), patterns(expected))


KEY = 0x9E3779B97F4A7C15


@every_path
@pytest.mark.parametrize("first", [0, 3, 2**32 - 1000, 2**33 + 5])
def test_stochastic_rounding_depends_on_key_and_index_alone(path, first):
    stored, delta = make(3001, torch.bfloat16, torch.float32)
    whole = assert_same(path, stored, delta, 0.1, rounding_key=KEY, first=first)
    part, _ = run(path, stored[7:], delta[7:], 0.1, rounding_key=KEY, first=first + 7)
    assert torch.equal(part, whole[7:])
    other, _ = run(path, stored, delta, 0.1, rounding_key=KEY + 1, first=first)
    assert not torch.equal(other, whole)


def test_stochastic_rounding_keeps_what_rounding_to_nearest_loses():
    """The mean is exact: an update a twentieth of a rounding step survives as a twentieth of
    the elements taking a whole one."""
    stored = torch.full((400_000,), 1.0, dtype=torch.bfloat16)
    delta = torch.full((400_000,), 2**-7 / 20)
    nearest, _ = reference(stored, delta, 1.0)
    assert torch.equal(nearest, stored)
    merged, effect = reference(stored, delta, 1.0, rounding_key=KEY)
    up = (merged != stored).float().mean().item()
    assert up == pytest.approx(1 / 20, abs=4 * (0.05 * 0.95 / 400_000) ** 0.5)
    assert set(merged.tolist()) == {1.0, 1.0 + 2**-7}
    assert effect.retained_share == pytest.approx(1.0, abs=0.03)


def test_the_noise_is_uniform_and_neighbours_and_keys_are_independent():
    drawn = noise(KEY, 0, 2**20, torch.device("cpu")).double() / 2**16
    other = noise(KEY ^ 1, 0, 2**20, torch.device("cpu")).double() / 2**16
    counts = torch.histc(drawn, 256, 0.0, 1.0)
    chi_squared = ((counts - 4096) ** 2 / 4096).sum().item()
    assert 255 - 4 * (2 * 255) ** 0.5 < chi_squared < 255 + 4 * (2 * 255) ** 0.5
    for one, two in ((drawn[1:], drawn[:-1]), (drawn[64:], drawn[:-64]), (drawn, other)):
        correlation = torch.corrcoef(torch.stack((one, two)))[0, 1].item()
        assert abs(correlation) < 4 / 2**10


@quiet_numpy
def test_stochastic_rounding_never_hides_a_nan():
    """All bits set is a NaN that a carry would turn into zero."""
    total = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001]).to(torch.int32).view(torch.float32)
    assert torch.isnan(round_stochastic(total, KEY, 0)).all()
    stored = torch.zeros(3, dtype=torch.bfloat16)
    for path in (fused_add_cpu, on_triton):
        for key in (None, KEY):
            assert run(path, stored, total, 1.0, rounding_key=key)[1].non_finite == 3


@every_path
def test_a_stack_takes_a_coefficient_for_each_slice_and_masks_that_start_inside_a_byte(path):
    stored, delta = make(3 * 5 * 7, torch.bfloat16, torch.int8)
    scales = make_scales(15, 7).view(3, 5, 1)
    stored, delta = stored.view(3, 5, 7), delta.view(3, 5, 7)
    keep = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(4)) < 0.5
    keep_bits = pack_keep(keep)
    coefficients = [50.0, 300.0, 1700.0]
    out, _ = fused_add(
        stored, delta, coefficients, scales=scales, keep_bits=keep_bits, rounding_key=KEY
    )
    for i, coefficient in enumerate(coefficients):
        merged = assert_same(
            path, stored[i].flatten(), delta[i].flatten(), coefficient,
            scales=scales[i].flatten(), row_length=7, keep_bits=keep_bits, rounding_key=KEY,
            first=i * 35,
        )  # fmt: skip
        assert torch.equal(out[i].flatten(), merged)


def test_non_contiguous_inputs_and_in_place_output():
    stored, delta = make(64 * 48, torch.bfloat16, torch.bfloat16)
    stored, delta = stored.view(64, 48).mT, delta.view(64, 48).mT
    expected, _ = reference(stored.flatten(), delta.flatten(), 1.5)
    out, _ = fused_add(stored, delta, [1.5])
    assert torch.equal(out.flatten(), expected)
    for place in (0, 1):
        both = [stored.contiguous(), delta.contiguous()]
        fused_add(*both, [1.5], out=both[place])
        assert torch.equal(both[place], out)


def test_the_result_does_not_depend_on_threads():
    stored, delta = make(2_000_007, torch.bfloat16, torch.bfloat16)
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
@every_path
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["stored", "delta"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_values_are_counted(path, bad, where, dtype):
    stored, delta = make(5000, dtype, dtype)
    (stored if where == "stored" else delta)[4711] = bad
    assert run(path, stored, delta, 0.5)[1].non_finite == 1


@quiet_numpy
@every_path
def test_overflow_on_rounding_is_counted(path):
    for dtype in (torch.float16, torch.bfloat16):
        stored = torch.full((10,), torch.finfo(dtype).max, dtype=dtype)
        delta = torch.full((10,), torch.finfo(dtype).max * 0.01)
        assert run(path, stored, delta, 1.0)[1].non_finite == 10


def test_a_read_only_home_costs_the_compiled_loops_cache_and_nothing_else():
    """Numba refuses to keep what it compiled where it cannot write: then it is compiled anew."""
    code = (
        "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
        "import torch; from enchtable_kernels import fused_add\n"
        "print(fused_add(torch.ones(3), torch.ones(3), [1.0])[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[2.0, 2.0, 2.0]"


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
@pytest.mark.parametrize("delta_dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
def test_gpu_path_has_the_references_bits(count, stored_dtype, delta_dtype, masked, key):
    stored, delta = make(count, stored_dtype, delta_dtype, seed=5)
    more = {"rounding_key": key}
    if delta_dtype == torch.int8:
        more |= {"scales": make_scales(1, count), "row_length": count}
    if masked:
        more |= {"keep_bits": pack_keep(torch.rand(count) < 0.5)}
    assert_same(on_triton, stored, delta, 0.37, **more)


@pytest.mark.gpu
def test_gpu_path_past_two_to_the_31_elements():
    count = 2**31 + 4099
    stored = torch.full((count,), 0.5, dtype=torch.bfloat16, device="cuda")
    delta = torch.full((count,), 0.25, dtype=torch.bfloat16, device="cuda")
    out, sums = fused_add(stored, delta, [1.0])
    assert bool((out == 0.75).all())
    assert Effect.from_tensor(sums).added_sq == pytest.approx(count / 16, rel=1e-5)
