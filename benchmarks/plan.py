"""Planning against the authors' algorithm, matrix by matrix and for a whole model, on the CPU.

The peer is the method as published: two full fp32 SVDs and the dense formula, one pair of
matrices after the other, each on all threads. Ours plans as many pairs at once as there are
cores; a time is that of one pair. *Cold* factors both deltas, *cached* has the vector's factors.
The interference must agree with float64, beyond sides of 1024 and for a whole model with the
peer's, to 2.7e-4 of itself, which is 1e-4 of any attenuation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pydantic import Field

from benchmarks.architectures import Shape, random_of
from benchmarks.harness import NotVerified, Row, interleaved, row
from benchmarks.harness import Options as BaseOptions
from benchmarks.plan_bounds import PEER, bounds
from benchmarks.plan_cases import GAMMA, delta, published, random_model
from benchmarks.plan_model import Model
from benchmarks.plan_pages import PLOTS, TABLES
from enchtable_vllm.plan.interference import interference_terms
from enchtable_vllm.vector.factors import factor
from enchtable_vllm.vector.workers import worker_count, workers

__all__ = ["FULL", "PEER", "PLOTS", "QUICK", "TABLES", "Options", "bounds", "measure", "verify"]

QUICK = {"shapes": ("96x96", "80x320"), "rounds": 2, "layers": 1, "hidden": 96}
FULL = {
    "shapes": ("192x576", "576x576", "576x1536", "512x2048", "2048x2048", "1024x4096", "4096x4096"),
    "rounds": 5,
    "layers": 30,
}
#: x·e⁻ˣ ≤ 1/e: a relative error of the interference is at most 0.37 of it in the attenuation.
TOLERANCE = 1e-4 * math.e
#: A float64 SVD is affordable up to this side.
ORACLE_SIDE = 1024
_N = 0.1


class Options(BaseOptions):
    """Of planning."""

    shapes: tuple[str, ...] = Field(
        default=("192x576", "576x576", "576x1536", "512x2048", "2048x2048", "1024x4096"),
        description="of matrices, rows x columns",
    )
    spectra: tuple[str, ...] = Field(default=("flat", "decaying"), description="of random deltas")
    rounds: int = Field(default=3, ge=1, description="how often each is timed; small ones thrice")
    layers: int = Field(default=10, description="of the random model; 0: no whole model")
    hidden: int = Field(default=576, description="its width")
    task_model: Path | None = Field(default=None, description="instead of the random model")
    base_model: Path | None = Field(default=None, description="of the task model")
    safety_vector: Path | None = Field(default=None, description="of the task model")
    threads: int = Field(default_factory=torch.get_num_threads, description="the peer's")
    jobs: int = Field(default_factory=lambda: worker_count(None, "cpu"), description="ours")

    def pairs(self) -> Iterator[tuple[Shape, str]]:
        """Each shape with each spectrum."""
        for shape in self.shapes:
            rows, columns = map(int, shape.split("x"))
            for spectrum in self.spectra:
                yield (rows, columns), spectrum

    @property
    def model(self) -> str | None:
        """The whole model's name, if there is one."""
        if self.task_model is not None:
            return f"model {self.task_model.name}"
        return f"model of {self.layers} layers, {self.hidden} wide" if self.layers else None


class Pair:
    """Two random deltas, and each way to their interference."""

    def __init__(self, shape: Shape, spectrum: str, pool: ThreadPoolExecutor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.task, self.safety = (delta(shape, spectrum, generator) for _ in range(2))
        self._cached = pool.submit(factor, self.safety, GAMMA).result()

    def published(self) -> float:
        """The peer's."""
        return published(self.task, self.safety, _N, GAMMA)

    def cold(self, _: int = 0) -> tuple[float, float]:
        """Ours, both deltas factored."""
        return interference_terms(factor(self.task, GAMMA), factor(self.safety, GAMMA))

    def cached(self, _: int = 0) -> tuple[float, float]:
        """Ours, with the vector's factors."""
        return interference_terms(factor(self.task, GAMMA), self._cached)


def verify(options: Options) -> None:
    """Agrees with float64, or the peer where that takes too long; cached factors change nothing.

    The peer's two fp32 SVDs are themselves 3e-4 off for a decaying 1024x4096, more than we may be.
    """
    with workers(options.jobs) as pool:
        torch.set_num_threads(options.threads)
        for shape, spectrum in options.pairs():
            what, pair = f"{_name(shape)} {spectrum}", Pair(shape, spectrum, pool)
            a, b = pool.submit(pair.cold).result()
            _demand(what, pool.submit(pair.cached).result() == (a, b), "the same with factors")
            if min(shape) <= ORACLE_SIDE:
                exact = published(pair.task.double(), pair.safety.double(), _N, GAMMA)
                _agree(what, a * _N + b, "float64", exact)
            else:
                _agree(what, a * _N + b, PEER, pair.published())
    if options.model is not None:
        model = _model(options)
        made = model.plan("cold")
        _demand(
            options.model, model.plan("cached").tensors == made.tensors, "the same with factors"
        )
        found = sum(sum(tensor.interference) for tensor in made.merged.values())
        _agree(options.model, found, PEER, model.published())


def _agree(what: str, found: float, whose: str, expected: float) -> None:
    right = abs(found / expected - 1) <= TOLERANCE
    _demand(what, right, f"{whose}' interference, {expected}", found)


def _demand(what: str, right: bool, expected: str, got: object = "another") -> None:
    if not right:
        raise NotVerified(what, expected=expected, got=got, fix="No speed is reported.")


def _model(options: Options) -> Model:
    """The user's, or a random one, in the scratch folder."""
    paths = options.task_model, options.base_model, options.safety_vector
    if None in paths:
        made = options.scratch / "random"
        if not made.exists():
            random_model(made, random_of(options.layers, options.hidden))
        paths = made / "task", made / "base", made / "vector"
    task, base, vector = (Path(str(path)) for path in paths)
    return Model(options.scratch, (task, base, vector), jobs=options.jobs)


def measure(options: Options) -> Iterator[Row]:
    """Seconds for a pair of each shape, and for a whole model."""
    with workers(options.jobs) as pool:
        torch.set_num_threads(options.threads)
        for shape, spectrum in options.pairs():
            pair, fast = Pair(shape, spectrum, pool), min(shape) < ORACLE_SIDE
            seconds = interleaved(
                {
                    PEER: pair.published,
                    "cold": _several(pool, pair.cold, options.jobs),
                    "cached": _several(pool, pair.cached, options.jobs),
                },
                options.rounds * (3 if fast else 1),
                warm_up=fast,  # what takes seconds needs none
            )
            for name, values in seconds.items():
                share = 1 if name == PEER else options.jobs
                each = [value / share for value in values]
                yield row("plan", name, f"{_name(shape)} {spectrum}", "fp32", each)
    if options.model is not None:
        model = _model(options)
        ways: dict[str, Callable[[], object]] = {
            PEER: model.published,
            "cold": lambda: model.plan("cold"),
            "cached": lambda: model.plan("cached"),
        }
        for name, values in interleaved(ways, options.rounds, warm_up=False).items():
            yield row("plan", name, options.model, "fp32", values)


def _several(
    pool: ThreadPoolExecutor, way: Callable[[int], object], jobs: int
) -> Callable[[], object]:
    """As many pairs at once as there are jobs."""
    return lambda: list(pool.map(way, range(jobs)))


def _name(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"
