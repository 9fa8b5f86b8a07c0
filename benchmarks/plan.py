"""Planning against the authors' algorithm, matrix by matrix and for a whole model, on the CPU.

The peer is the method as published: two full fp32 SVDs and the dense formula, one pair of
matrices after the other, each on all threads. Ours plans as many pairs at once as there are
cores; a time is that of one pair. *Cold* factors both deltas, *cached* has the vector's factors.
Correctness first: the interference must agree with the peer's, and for sides up to 1024 with
float64, to 2.7e-4 of itself, which is 1e-4 of any attenuation; else no speed is reported.

*flat* deltas are Gaussian; *decaying* ones have a few strong directions, as fine-tunes do, and
climb to the second rung.

    python benchmarks/plan.py [--shapes 576x576 1024x4096] [--rounds 5] [--layers 30]
    python benchmarks/plan.py --quick
    python benchmarks/plan.py --threads 1 --jobs 1  # on a machine that others use as well
    python benchmarks/plan.py --shapes --task-model T --base-model B --safety-vector S
"""

from __future__ import annotations

import argparse
import math
import platform
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from _harness import interleaved, quantiles, row, write
from safetensors.torch import save_file

from enchtable_vllm.checkpoint import Checkpoint, local, locate
from enchtable_vllm.plan import MergePlan, PlanOptions, compute_plan
from enchtable_vllm.plan.interference import interference_terms
from enchtable_vllm.vector import SafetyVector, add_factors, build_vector
from enchtable_vllm.vector.factors import factor
from enchtable_vllm.vector.workers import worker_count, workers

PEER = "authors' algorithm"
SHAPES = ["576x576", "2048x2048", "576x1536", "1024x4096"]
GAMMA = 0.5
#: x·e⁻ˣ ≤ 1/e: a relative error of the interference is at most 0.37 of it in the attenuation.
TOLERANCE = 1e-4 * math.e
#: A float64 SVD is affordable up to this side.
ORACLE_SIDE = 1024


def published(task: torch.Tensor, safety: torch.Tensor, n: float, gamma: float) -> float:
    """Interference as published, in the precision of its inputs: SVD, join, multiply."""
    u1, s1, v1 = torch.linalg.svd(task, full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(n * safety, full_matrices=False)
    k1, k2 = math.floor(gamma * len(s1)), math.floor(gamma * len(s2))
    u = torch.cat([u1[:, :k1], u2[:, :k2]], dim=1)
    v = torch.cat([v1[:k1], v2[:k2]]).mT
    sigma = torch.diag(torch.cat([s1[:k1], s2[:k2]]))
    identity = torch.eye(k1 + k2, dtype=task.dtype)
    entries = (u.mT @ u - identity) @ sigma @ (v.mT @ v - identity)
    return 200 * float(entries.abs().sum()) / (k1 + k2) ** 2


def delta(shape: tuple[int, int], spectrum: str, generator: torch.Generator) -> torch.Tensor:
    """A random delta of 1e-3 rms or so."""
    rows, columns = shape
    noise = torch.randn(shape, generator=generator) * 1e-3
    if spectrum == "flat":
        return noise
    rank = min(shape) // 8
    left = torch.randn((rows, rank), generator=generator) * torch.logspace(0, -2, rank)
    strong = 0.02 * (left @ torch.randn((rank, columns), generator=generator))
    return (noise + strong) * 0.1  # a fine-tune's size beside weights of 0.05


def check(what: str, found: float, task: torch.Tensor, safety: torch.Tensor, n: float) -> None:
    """Refuse to report a speed where the number is not right."""
    expected = {PEER: published(task, safety, n, GAMMA)}
    if min(task.shape) <= ORACLE_SIDE:
        expected["float64"] = published(task.double(), safety.double(), n, GAMMA)
    for name, value in expected.items():
        if not abs(found / value - 1) <= TOLERANCE:
            raise SystemExit(f"{what}: {found}, but {name} gives {value}: no speed is reported")


def matrices(
    shape: tuple[int, int], spectrum: str, rounds: int, jobs: int, pool: ThreadPoolExecutor
) -> dict[str, list[float]]:
    """Seconds for one pair of one shape, for each provider."""
    generator = torch.Generator().manual_seed(0)
    task, safety = (delta(shape, spectrum, generator) for _ in range(2))
    cached = pool.submit(factor, safety, GAMMA).result()

    def cold(_: int) -> tuple[float, float]:
        return interference_terms(factor(task, GAMMA), factor(safety, GAMMA))

    def warm(_: int) -> tuple[float, float]:
        return interference_terms(factor(task, GAMMA), cached)

    a, b = pool.submit(cold, 0).result()
    if pool.submit(warm, 0).result() != (a, b):
        raise SystemExit("cached factors change the result: no speed is reported")
    check(f"{shape} {spectrum}", a * 0.1 + b, task, safety, 0.1)
    seconds = interleaved(
        {
            PEER: lambda: published(task, safety, 0.1, GAMMA),
            "cold": lambda: list(pool.map(cold, range(jobs))),
            "cached": lambda: list(pool.map(warm, range(jobs))),
        },
        rounds,
    )
    return {
        name: values if name == PEER else [value / jobs for value in values]
        for name, values in seconds.items()
    }


def random_model(folder: Path, layers: int, hidden: int) -> tuple[Path, Path, Path]:
    """Checkpoints of SmolLM2-135M's proportions: (task, base, vector)."""
    generator = torch.Generator().manual_seed(0)
    kv, ffn = hidden // 3, hidden * 8 // 3
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    weights = {
        f"model.layers.{layer}.{kind}.weight": torch.randn(shape, generator=generator) * 0.05
        for layer in range(layers)
        for kind, shape in shapes.items()
    }
    for name, sign in (("base", 0), ("surrogate", -1), ("task", 1)):
        (folder / name).mkdir(parents=True)
        moved = {
            key: w + sign * delta((w.shape[0], w.shape[1]), "decaying", generator)
            for key, w in weights.items()
        }
        if name != "surrogate":
            moved = {key: w.bfloat16() for key, w in moved.items()}
        save_file(moved, folder / name / "model.safetensors")
    (folder / "aligned").mkdir()
    save_file(weights, folder / "aligned" / "model.safetensors")
    build_vector(
        locate(folder / "aligned"),
        locate(folder / "surrogate"),
        folder / "vector",
        scope="attention+ffn",
    )
    return folder / "task", folder / "base", folder / "vector"


def published_plan(task: Checkpoint, base: Checkpoint, vector: SafetyVector, n: float) -> float:
    """The peer on a whole model: the interference of all merged matrices, added up."""
    total = 0.0
    for name, entry in vector.tensors.items():
        moved = task.read(name).float() - base.read(name).float()
        if len(entry.shape) == 2:
            total += published(moved, vector.read(name).float(), n, GAMMA)
    return total


def model(
    paths: tuple[Path, Path, Path], scratch: Path, rounds: int, jobs: int
) -> dict[str, list[float]]:
    """Seconds for a whole plan: files read, digests and outcome included, for each provider."""
    ends = [local(path) for path in paths[:2]]
    task, base = (Checkpoint(end.path) for end in ends)
    vectors = {}
    for name in ("cold", "cached"):
        shutil.copytree(paths[2], scratch / name, ignore=shutil.ignore_patterns("*factors*"))
        vectors[name] = SafetyVector.open(scratch / name)
    add_factors(vectors["cached"], jobs=jobs, max_shard_bytes=10**10)
    vectors["cached"] = SafetyVector.open(scratch / "cached")

    def plan(vector: SafetyVector) -> MergePlan:
        options = PlanOptions(jobs=jobs, allow_other_base=True)
        return compute_plan(ends[0], ends[1], vector, options)

    made = plan(vectors["cold"])
    if plan(vectors["cached"]).tensors != made.tensors:
        raise SystemExit("cached factors change the plan: no speed is reported")
    found = sum(sum(tensor.interference) for tensor in made.merged.values())
    expected = published_plan(task, base, vectors["cold"], made.norm_scale)
    if not abs(found / expected - 1) <= TOLERANCE:
        raise SystemExit(f"{found}, but {PEER} gives {expected}: no speed is reported")
    return interleaved(
        {
            PEER: lambda: published_plan(task, base, vectors["cold"], made.norm_scale),
            "cold": lambda: plan(vectors["cold"]),
            "cached": lambda: plan(vectors["cached"]),
        },
        rounds,
    )


def measurements(
    options: argparse.Namespace, jobs: int
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """What was measured, and the seconds of each provider."""
    with workers(jobs) as pool:
        torch.set_num_threads(options.threads)
        for shape in options.shapes:
            rows, columns = map(int, shape.split("x"))
            for spectrum in options.spectra:
                found = matrices((rows, columns), spectrum, options.rounds, jobs, pool)
                yield f"{shape} {spectrum}", found
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.task_model is not None:
            paths = options.task_model, options.base_model, options.safety_vector
            name = f"model {options.task_model.name}"
        elif options.layers:
            paths = random_model(folder / "random", options.layers, options.hidden)
            name = f"model of {options.layers} layers, {options.hidden} wide"
        else:
            return
        yield name, model(paths, folder, options.rounds, jobs)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--spectra", nargs="*", default=["flat", "decaying"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30, help="0: no whole model")
    parser.add_argument("--hidden", type=int, default=576)
    for name in ("--task-model", "--base-model", "--safety-vector"):
        parser.add_argument(name, type=Path, help="measure on these instead of random ones")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="the peer's")
    parser.add_argument("--jobs", type=int, default=worker_count(None, "cpu"), help="ours")
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.rounds = ["96x96", "80x320"], 2
        options.layers, options.hidden = 1, 96
    return options


def main() -> None:
    """Measure, print ratios, append rows to results/plan.csv."""
    options = parse()
    jobs = options.jobs
    device = f"{platform.machine()} CPU, {options.threads} threads, {jobs} jobs"
    print(f"median seconds on {device}")
    print(f"{'':34}{PEER:>20}{'cold':>10}{'':>8}{'cached':>10}")
    rows: list[dict[str, object]] = []
    for what, seconds in measurements(options, jobs):
        middle = {name: quantiles(values)[1] for name, values in seconds.items()}
        line = f"{what:34}{middle[PEER]:20.4f}"
        for name in ("cold", "cached"):
            line += f"{middle[name]:10.4f}{middle[PEER] / middle[name]:7.1f}x"
        print(line)
        for name, values in seconds.items():
            rows.append(row("plan", name, what, "fp32", values))
    if not options.quick:
        print(f"rows appended to {write('plan', rows, device)}")


if __name__ == "__main__":
    main()
