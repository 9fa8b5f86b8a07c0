"""The leading singular directions of a delta, by the cheapest algorithm that settles them.

Left singular vectors come from the eigenvectors of the Gram matrix of the short side. That
squares the condition number, so there is a ladder:

- ``gram32``: in fp32, where the kept singular values stand well clear of its noise. A bound on
  them that is much cheaper than eigenvectors tells where this cannot do.
- ``deflated32``: in fp32, where they do once a few strong directions are taken out, as
  fine-tunes have them. Those few are found by subspace iteration, which ends with the matrix
  itself, not its rounded Gram matrix, and with fp64, which is cheap for few.
- ``gram64``: in fp64, where they stand clear of its noise.
- ``svd64``: elsewhere, and for small matrices, where it costs nothing.

Source: the counting rule (numerical rank) is this project's: without it, rank-deficient deltas
have no well-defined interference. Subspace iteration: Halko, Martinsson, Tropp (arXiv 0909.4061).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from enchtable_vllm.errors import ConfigError

Rung = Literal["gram32", "deflated32", "gram64", "svd64", "zero"]

#: Raised whenever the same matrix would give other bits.
COMPUTATION = 4
#: Below this short side an fp64 SVD is the cheapest rung.
_SMALL_SIDE = 64
#: fp32 Gram: eigenvalues carry an error near 2⁻²⁴·side^½ of the largest, so a kept singular
#: value needs to stand above its square root by a comfortable factor.
_GRAM32_CLEARANCE = 0.1
#: fp64 Gram: likewise, 2⁻⁵³.
_GRAM64_CLEARANCE = 1e-5
#: Strong directions are sought among so many: a share of the short side.
_DIRECTIONS = 1 / 6
#: With the Gram matrix; once more with the matrix itself.
_ITERATIONS = 3
#: Strong is what is so many times the weakest of those sought: the others have not converged.
_STRONG = 3.0
#: Weak ones may be so much less than the strongest: it is rounded at its own size, and some of
#: that stays in the rest.
_WEAKEST = 1e-4
#: Radians by which a strong and a weak direction may still have to be turned, which is then done
#: to first order.
_TURNED = 1e-3
#: Singular values at or below max(rows, columns) · 2⁻²⁴ · σ₁ do not count.
_RANK_EPSILON = 2.0**-24
#: The Gram matrix is computed in this many strips of rows, each up to the diagonal only.
_STRIPS = 8
#: Columns converted to fp64 at once.
_CHUNK = 8192
#: Directions in the bound's subspace: a share of the short side, but as many as this at least.
_PROBES = 1 / 16
_FEWEST_PROBES = 32


@dataclass(frozen=True)
class Factors:
    """The leading left singular vectors of a matrix and their products with it.

    The matrix lies on its short side: ``[short, long]``, transposed if it was tall. Both are
    fp32 whatever the rung: each row of ``right`` keeps fp32's precision relative to its own
    singular value, so nothing of what a higher rung resolved is lost.

    Attributes:
        left: ``[short, k]`` fp32: U's leading columns, singular values descending.
        right: ``[k, long]`` fp32: UᵀM = ΣVᵀ.
        exponent: The matrix was scaled by 2^−exponent before all this.
        rung: Which algorithm was needed.
    """

    left: torch.Tensor
    right: torch.Tensor
    exponent: int
    rung: Rung

    @property
    def rank(self) -> int:
        """k: the counted triplets."""
        return self.left.shape[1]

    @property
    def sigma(self) -> torch.Tensor:
        """``[k]`` fp32: the singular values, scaled like the matrix."""
        sigma: torch.Tensor = torch.linalg.vector_norm(self.right, dim=1)
        return sigma


def check_rank_fraction(value: float) -> None:
    """Refuse a γ that is none.

    Raises:
        ConfigError: It is not in (0, 1].
    """
    if not 0 < value <= 1:
        raise ConfigError(
            "rank fraction",
            expected="a number above 0, at most 1",
            got=value,
            fix="The method's own is 0.5.",
        )


def kept_directions(short: int, rank_fraction: float) -> int:
    """⌊γ · short⌋."""
    return math.floor(rank_fraction * short)


def factor(matrix: torch.Tensor, rank_fraction: float) -> Factors:
    """Leading factors of a matrix.

    Args:
        matrix: ``[rows, columns]`` fp32, finite, on any device.
        rank_fraction: γ: ⌊γ · min(rows, columns)⌋ triplets are kept, but never more than the
            numerical rank.

    Returns:
        Its factors; of rank 0 for a zero matrix or a short side of 1.
    """
    oriented = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    short, long = oriented.shape
    wanted = kept_directions(short, rank_fraction)
    largest = float(torch.linalg.vector_norm(oriented, math.inf)) if oriented.numel() else 0.0
    if wanted == 0 or largest == 0.0:
        empty = oriented.new_zeros
        return Factors(empty((short, 0)), empty((0, long)), 0, "zero")
    exponent = max(math.frexp(largest)[1], -120)  # 2^-exponent stays within fp32
    scaled = oriented * 2.0**-exponent
    floor = max(short, long) * _RANK_EPSILON
    if short > _SMALL_SIDE:
        for rung, found in _attempts(scaled, wanted, floor):
            if found is not None:
                return Factors(*found, exponent, rung)
    return Factors(*_by_svd(scaled.double(), wanted, floor), exponent, "svd64")


#: Left and right, or None where a rung does not settle them.
_Found = tuple[torch.Tensor, torch.Tensor] | None


def _attempts(matrix: torch.Tensor, wanted: int, floor: float) -> Iterator[tuple[Rung, _Found]]:
    """The rungs that may do, the cheapest first."""
    gram = _gram(matrix, torch.float32)
    if _kept_at_most(gram, wanted) >= _GRAM32_CLEARANCE:
        yield "gram32", _by_gram(matrix, gram, wanted, floor, _GRAM32_CLEARANCE)
    yield "deflated32", _by_deflation(matrix, gram, wanted, floor)
    del gram
    gram = _gram(matrix, torch.float64)
    yield "gram64", _by_gram(matrix, gram, wanted, floor, _GRAM64_CLEARANCE)


def _columns(matrix: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The matrix in another precision, never all of it at once."""
    return (part.to(dtype) for part in torch.split(matrix, _CHUNK, dim=1))


def _gram(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """M·Mᵀ: nine sixteenths of the products, mirrored."""
    short = matrix.shape[0]
    gram = torch.zeros((short, short), dtype=dtype, device=matrix.device)
    strips = [
        (top, min(top + -(-short // _STRIPS), short))
        for top in range(0, short, -(-short // _STRIPS))
    ]
    for part in _columns(matrix, dtype):
        for top, bottom in strips:
            gram[top:bottom, :bottom].addmm_(part[top:bottom], part[:bottom].mT)
    for top, bottom in strips:
        gram[:top, top:bottom] = gram[top:bottom, :top].mT
    return gram


def _by_gram(
    matrix: torch.Tensor, gram: torch.Tensor, wanted: int, floor: float, clearance: float
) -> _Found:
    """By the eigenvectors of the Gram matrix, in its precision."""
    eigen = _eigen(gram)
    if eigen is None:
        return None
    sigma, vectors = eigen
    relative = sigma / sigma[0]
    # Either every kept value is clear of the noise, or (fp64 only) the spectrum falls off a
    # cliff: values that count stand clear, and the rest is far below the counting threshold.
    counted = int((relative[:wanted] > max(floor, clearance)).sum())
    if counted < wanted:
        if gram.dtype == torch.float32:
            return None
        rest = float(relative[counted])
        noise = math.sqrt(matrix.shape[1] * torch.finfo(gram.dtype).eps)
        if rest > max(noise, floor / 4) or rest > floor:
            return None
    left = vectors[:, :counted].contiguous()
    right = [(left.mT @ part).float() for part in _columns(matrix, gram.dtype)]
    return left.float(), torch.cat(right, 1)


def _by_deflation(matrix: torch.Tensor, gram: torch.Tensor, wanted: int, floor: float) -> _Found:
    """Strong directions by themselves, and of the rest by its Gram matrix; all in fp32."""
    strong = _strong_directions(matrix, gram, int(matrix.shape[0] * _DIRECTIONS))
    if strong is None or strong[0].shape[1] >= wanted:
        return None
    left, right = strong
    # In a basis that begins with the strong directions the others are what its end sees: a
    # smaller matrix, whose directions are orthogonal to them.
    reflectors = torch.geqrf(left)
    rest = torch.ormqr(*reflectors, matrix.mT, left=False)[:, left.shape[1] :].mT
    eigen = _eigen(_gram(rest, torch.float32))
    if eigen is None:
        return None
    weak = eigen[1][:, : wanted - left.shape[1]]
    weak_right = weak.mT @ rest
    del rest
    weak = torch.ormqr(*reflectors, torch.cat([left.new_zeros(left.shape[1], weak.shape[1]), weak]))
    above, below = (torch.linalg.vector_norm(of, dim=1) for of in (right, weak_right))
    # What counts by a hair is left to fp64.
    least = max(2 * floor, _WEAKEST) * above[0]
    if below[-1] < max(least, _GRAM32_CLEARANCE * below[0]):
        return None
    turned = (right @ weak_right.mT) / (above[:, None] ** 2 - below**2)
    if not turned.abs().max() < _TURNED:
        return None
    # However little a strong direction is turned, beside a weak one it is much.
    left, weak = left + weak @ turned.mT, weak - left @ turned
    right, weak_right = right + turned @ weak_right, weak_right - turned.mT @ right
    return torch.cat([left, weak], 1), torch.cat([right, weak_right])


def _strong_directions(matrix: torch.Tensor, gram: torch.Tensor, directions: int) -> _Found:
    """Those of the leading directions that stand out enough to be exact; None if none does."""
    basis = _random(gram, directions)
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(gram @ basis)
    # Each by itself: in a mixture, rounding would hide the less strong ones.
    ritz = _eigen(basis.mT @ (gram @ basis))
    if ritz is None:
        return None
    basis, _ = torch.linalg.qr(matrix @ (matrix.mT @ (basis @ ritz[1])))
    product = (basis.mT @ matrix).double()
    ritz = _eigen(product @ product.mT)
    if ritz is None:
        return None
    sigma, turn = ritz
    turn = turn[:, sigma > _STRONG * sigma[-1]]
    if turn.shape[1] == 0:
        return None
    return (basis.double() @ turn).float(), (turn.mT @ product).float()


def _eigen(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Square roots of the eigenvalues, descending, and eigenvectors; None if LAPACK gives up."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing in its stubs
        return None
    return values.clamp_min(0).sqrt().flip(0), vectors.flip(1)


def _random(gram: torch.Tensor, directions: int) -> torch.Tensor:
    """Where iterations start: the same on every device."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(
        (gram.shape[0], directions), generator=generator, dtype=gram.dtype, device="cpu"
    )
    return start.to(gram.device)


def _kept_at_most(gram: torch.Tensor, wanted: int) -> float:
    """An upper bound of σ_wanted / σ₁, from the trace and Rayleigh quotients.

    In any d directions lies at most what lies in the leading d (Ky Fan), so trace − theirs
    bounds the sum of the other eigenvalues, and what is left of the kept ones is at most its
    share. It decides which rung is tried, never a result: being off costs time alone.
    """
    probes = min(max(_FEWEST_PROBES, int(gram.shape[0] * _PROBES)), wanted // 2)
    if probes == 0:
        return 1.0
    basis, _ = torch.linalg.qr(gram @ _random(gram, probes))
    quotient = basis.mT @ (gram @ basis)
    rest = float(gram.trace()) - float(quotient.trace())
    largest = float(torch.linalg.eigvalsh(quotient)[-1])
    return math.sqrt(max(rest, 0.0) / (wanted - probes) / largest) if largest > 0 else 1.0


def _by_svd(matrix: torch.Tensor, wanted: int, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    counted = int((sigma[:wanted] > floor * sigma[0]).sum())
    return (
        left[:, :counted].float().contiguous(),
        (sigma[:counted, None] * right[:counted]).float().contiguous(),
    )
