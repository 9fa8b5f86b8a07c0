"""Interference against a float64 oracle: the dense formula, full SVDs, nothing shared."""

import math

import pytest
import torch

from enchtable_vllm.plan.interference import interference_terms
from enchtable_vllm.vector import factors
from enchtable_vllm.vector.factors import factor

GAMMA = 0.5
TOLERANCE = 1e-4
#: Repeated singular values leave the basis free: no algorithm can be asked for more.
REPEATED = 5e-3


def oracle(task, safety, n, gamma=GAMMA):
    """exp(−200 · ‖(UᵀU − I) Σ (VᵀV − I)‖₁ / (k₁ + k₂)²) in float64, written from the paper."""
    parts = []
    for matrix in (task.double(), n * safety.double()):
        u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
        numerical_rank = int((sigma > max(matrix.shape) * 2.0**-24 * sigma[0]).sum())
        k = min(math.floor(gamma * len(sigma)), numerical_rank)
        parts.append((u[:, :k], sigma[:k], vt[:k].mT))
    if parts[0][1].numel() == 0:
        return 1.0
    u = torch.cat([p[0] for p in parts], dim=1)
    v = torch.cat([p[2] for p in parts], dim=1)
    sigma = torch.diag(torch.cat([p[1] for p in parts]))
    identity = torch.eye(u.shape[1], dtype=torch.float64)
    entries = (u.mT @ u - identity) @ sigma @ (v.mT @ v - identity)
    return math.exp(-200 * float(entries.abs().sum()) / u.shape[1] ** 2)


def attenuation(task, safety, n, gamma=GAMMA):
    a, b = interference_terms(factor(task.float(), gamma), factor(safety.float(), gamma))
    return math.exp(-(a * n + b))


def gaussian(shape, generator):
    return torch.randn(shape, generator=generator)


def low_rank(shape, generator, rank=8, noise=1e-2):
    rows, columns = shape
    product = gaussian((rows, rank), generator) @ gaussian((rank, columns), generator)
    return product / rank**0.5 + noise * gaussian(shape, generator)


def exact_low_rank(shape, generator):
    return low_rank(shape, generator, rank=5, noise=0.0)


def mostly_zero(shape, generator):
    return gaussian(shape, generator) * (torch.rand(shape, generator=generator) < 0.01)


def with_spectrum(sigma, shape, generator):
    """These singular values, in random directions."""
    u, _ = torch.linalg.qr(gaussian((shape[0], len(sigma)), generator).double())
    v, _ = torch.linalg.qr(gaussian((shape[1], len(sigma)), generator).double())
    return (u * sigma @ v.mT).float()


def decaying(shape, generator):
    """Singular values from 1 down to 1e-7: below fp32's noise, and below the counting rule."""
    sigma = torch.logspace(0, -7, min(shape), dtype=torch.float64)
    return with_spectrum(sigma, shape, generator)


def many_strong(shape, generator):
    """An eighth of the directions stand out, from a hundred times the noise down to it."""
    rows, columns = shape
    rank = min(shape) // 8
    left = gaussian((rows, rank), generator) * torch.logspace(0, -2, rank)
    return left @ gaussian((rank, columns), generator) + 0.05 * gaussian(shape, generator)


KINDS = [gaussian, low_rank, exact_low_rank, mostly_zero, decaying, many_strong]
SHAPES = [(3, 3), (2, 9), (64, 64), (65, 80), (96, 288), (288, 96), (192, 192)]


def measured_where_it_can_be_wrong(task, safety):
    """Scales and a norm scale at which interference is near 1, half of it from either block: an
    attenuation near 0 or 1 would hide any error."""
    a, b = interference_terms(factor(task.float(), GAMMA), factor(safety.float(), GAMMA))
    return (0.5 / b if b else 1.0), (0.5 / a if a else 1.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("task_kind", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("safety_kind", KINDS, ids=lambda f: f.__name__)
def test_attenuation_matches_the_oracle(shape, task_kind, safety_kind):
    generator = torch.Generator().manual_seed(0)
    task, safety = task_kind(shape, generator), safety_kind(shape, generator)
    scale, n = measured_where_it_can_be_wrong(task, safety)
    for factor_ in (0.3, 1.0, 2.0):
        expected = oracle(task * (scale * factor_), safety, n * factor_)
        found = attenuation(task * (scale * factor_), safety, n * factor_)
        assert found == pytest.approx(expected, abs=TOLERANCE)
        if min(shape) > 2 and task.any() and safety.any():
            assert 0.05 < expected < 0.95, "a case that cannot fail"


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e-2, 1.0, 1e2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scales_and_dtypes(scale, dtype):
    generator = torch.Generator().manual_seed(1)
    shape = (80, 120)
    task = (gaussian(shape, generator) * 0.01).to(dtype)
    safety = (low_rank(shape, generator) * scale).to(dtype)
    if not safety.any():
        assert (dtype, scale) == (torch.float16, 1e-8)  # below its smallest number
        assert attenuation(task, safety, 1.0) == 1.0
        return
    a, _ = interference_terms(factor(task.float(), GAMMA), factor(safety.float(), GAMMA))
    expected = oracle(task, safety, 0.5 / a)
    assert 0.05 < expected < 0.95
    assert attenuation(task, safety, 0.5 / a) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("kept", [0.3, 0.12, 0.08, 0.03, 1e-3])
@pytest.mark.parametrize("shape", [(128, 512), (128, 2048)], ids=str)
def test_spectra_around_the_ladders_thresholds(shape, kept):
    """One strong direction and a floor of noise whose kept values stand at ``kept`` of it."""
    generator = torch.Generator().manual_seed(10)
    pair = []
    for _ in range(2):
        noise = gaussian(shape, generator)
        sigma = torch.linalg.svdvals(noise)[shape[0] // 2 - 1]
        u, v = gaussian((shape[0], 1), generator), gaussian((1, shape[1]), generator)
        spike = u / u.norm() @ (v / v.norm())
        pair.append(spike * float(sigma) / kept + noise)
    task, safety = pair
    scale, n = measured_where_it_can_be_wrong(task, safety)
    expected = oracle(task * scale, safety, n)
    assert 0.05 < expected < 0.95
    assert attenuation(task * scale, safety, n) == pytest.approx(expected, abs=TOLERANCE)


def test_extreme_scales_do_not_overflow_or_underflow():
    generator = torch.Generator().manual_seed(2)
    task, safety = gaussian((70, 90), generator), gaussian((70, 90), generator)
    reference = interference_terms(factor(task, GAMMA), factor(safety, GAMMA))
    for exponent in (-100, 90):
        scaled = interference_terms(
            factor(task * 2.0**exponent, GAMMA), factor(safety * 2.0**exponent, GAMMA)
        )
        # A power of two changes nothing but the exponent.
        assert scaled == tuple(math.ldexp(x, exponent) for x in reference)


def test_identical_vectors():
    task = gaussian((96, 128), torch.Generator().manual_seed(3)) * 1e-2
    for n in (0.1, 1.0):
        assert attenuation(task, task.clone(), n) == pytest.approx(
            oracle(task, task, n), abs=TOLERANCE
        )


def test_zero_task_delta_and_sides_of_one_leave_the_vector_whole():
    safety = torch.randn(70, 90)
    assert attenuation(torch.zeros(70, 90), safety, 1.0) == 1.0
    assert attenuation(safety, torch.zeros(70, 90), 1.0) == 1.0
    assert attenuation(torch.randn(1, 50), torch.randn(1, 50), 1.0) == 1.0
    assert attenuation(torch.randn(50, 1), torch.randn(50, 1), 1.0) == 1.0


def test_repeated_singular_values():
    identity = torch.eye(128) * 0.01
    safety = torch.randn(128, 128, generator=torch.Generator().manual_seed(4)) * 1e-3
    found = attenuation(identity, safety, 0.3)
    assert found == pytest.approx(oracle(identity, safety, 0.3), abs=REPEATED)


def test_wide_and_tall_are_one():
    generator = torch.Generator().manual_seed(5)
    task, safety = gaussian((80, 200), generator), gaussian((80, 200), generator)
    wide = interference_terms(factor(task, GAMMA), factor(safety, GAMMA))
    tall = interference_terms(factor(task.mT, GAMMA), factor(safety.mT, GAMMA))
    assert wide == tall


def test_interference_is_linear_in_the_norm_scale():
    """The oracle at several n lies on the line through a and b."""
    generator = torch.Generator().manual_seed(6)
    task, safety = gaussian((80, 96), generator) * 1e-2, gaussian((80, 96), generator) * 1e-2
    a, b = interference_terms(factor(task, GAMMA), factor(safety, GAMMA))
    for n in (0.01, 0.1, 1.0, 3.0):
        assert -math.log(oracle(task, safety, n)) == pytest.approx(a * n + b, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "gamma", "rung"),
    [
        (gaussian, 0.5, "gram32"),
        (low_rank, 0.5, "deflated32"),
        (many_strong, 0.5, "deflated32"),
        (exact_low_rank, 0.5, "gram64"),
        (decaying, 0.3, "gram64"),
        (decaying, 1.0, "svd64"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_the_ladder_climbs_only_as_far_as_needed(kind, gamma, rung):
    matrix = kind((200, 400), torch.Generator().manual_seed(7))
    assert factor(matrix, gamma).rung == rung
    assert factor(torch.zeros(200, 400), GAMMA).rung == "zero"
    assert factor(matrix[:8], GAMMA).rung == "svd64"


def blocks(weak, ratio, strong):
    """One direction of 1, some at a few times the weak ones, and those."""
    sigma = weak * torch.linspace(1, 0.15, 96, dtype=torch.float64)
    sigma[1 : 1 + strong] = weak * ratio * torch.linspace(1.5, 1, strong, dtype=torch.float64)
    sigma[0] = 1
    return sigma


def spike(shape, generator):
    rows, columns = (gaussian((side, 1), generator) for side in shape)
    return gaussian(shape, generator) + 100 * rows @ columns.mT


@pytest.mark.parametrize("kind", [low_rank, many_strong, spike], ids=lambda f: f.__name__)
def test_a_vector_along_the_task(kind):
    """Where most of the oracle's entries are zero, and so no errors cancel."""
    for seed in range(4):
        safety = kind((192, 256), torch.Generator().manual_seed(seed)).bfloat16().float()
        assert factor(safety, GAMMA).rung == "deflated32"
        scale, n = measured_where_it_can_be_wrong(3 * safety, safety)
        expected = oracle(3 * safety * scale, safety, n)
        assert 0.05 < expected < 0.95
        found = attenuation(3 * safety * scale, safety, n)
        assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("weak", "ratio", "strong", "gamma"),
    [(6e-3, 2, 9, 0.5), (6e-3, 3, 4, 0.13), (1e-2, 2.5, 6, 0.5), (5e-5, 6, 5, 0.5)],
)
def test_spectra_where_strong_and_weak_nearly_meet(weak, ratio, strong, gamma):
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        sigma = blocks(weak, ratio, strong)
        task, safety = (with_spectrum(sigma, (96, 128), generator) for _ in range(2))
        a, b = interference_terms(factor(task, gamma), factor(safety, gamma))
        expected = oracle(task * (0.5 / b), safety, 0.5 / a, gamma)
        assert 0.05 < expected < 0.95
        found = attenuation(task * (0.5 / b), safety, 0.5 / a, gamma)
        assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("shape", [(256, 256), (200, 800), (400, 420)], ids=str)
@pytest.mark.parametrize("slope", [0.5, 1.0, 1.5])
def test_power_laws(shape, slope):
    """σᵢ = i^−slope: nothing tells the strong directions from the others."""
    generator = torch.Generator().manual_seed(11)
    sigma = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -slope
    task, safety = (with_spectrum(sigma, shape, generator) for _ in range(2))
    scale, n = measured_where_it_can_be_wrong(task, safety)
    expected = oracle(task * scale, safety, n)
    assert 0.05 < expected < 0.95
    assert attenuation(task * scale, safety, n) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("name", "value"), [("_ITERATIONS", 1), ("_STRONG", 1.0)])
def test_strong_directions_that_are_not_exact_are_not_taken(monkeypatch, name, value):
    monkeypatch.setattr(factors, name, value)
    matrix = many_strong((200, 400), torch.Generator().manual_seed(7))
    assert factors.factor(matrix, GAMMA).rung == "gram64"


def test_rank_counts_only_what_stands_above_the_numerical_noise():
    matrix = exact_low_rank((100, 150), torch.Generator().manual_seed(8))
    assert factor(matrix, GAMMA).rank == 5
    assert factor(matrix + torch.randn(100, 150), GAMMA).rank == 50
    assert factor(matrix + torch.randn(100, 150), 0.25).rank == 25


def test_computing_twice_gives_the_same_bits():
    generator = torch.Generator().manual_seed(9)
    task, safety = gaussian((300, 300), generator), low_rank((300, 300), generator)
    first = interference_terms(factor(task, GAMMA), factor(safety, GAMMA))
    assert interference_terms(factor(task.clone(), GAMMA), factor(safety.clone(), GAMMA)) == first
