"""Deltas and models to plan with, and the algorithm as published: what planning is held against."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.architectures import Architecture, Shape
from enchtable_vllm.checkpoint import Checkpoint, locate
from enchtable_vllm.vector import SafetyVector, Scope, build_vector

GAMMA = 0.5


def published(task: torch.Tensor, safety: torch.Tensor, n: float, gamma: float) -> float:
    """Interference as published, in the precision of its inputs: SVD, join, multiply."""
    u1, s1, v1 = torch.linalg.svd(task, full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(n * safety, full_matrices=False)
    k1, k2 = math.floor(gamma * len(s1)), math.floor(gamma * len(s2))
    u = torch.cat([u1[:, :k1], u2[:, :k2]], dim=1)
    v = torch.cat([v1[:k1], v2[:k2]]).mT
    sigma = torch.diag(torch.cat([s1[:k1], s2[:k2]]))
    identity = torch.eye(k1 + k2, dtype=task.dtype, device=task.device)
    entries = (u.mT @ u - identity) @ sigma @ (v.mT @ v - identity)
    return 200 * float(entries.abs().sum()) / (k1 + k2) ** 2


def published_plan(
    task: Checkpoint, base: Checkpoint, vector: SafetyVector, n: float, device: str = "cpu"
) -> float:
    """The same for a whole model: the interference of all merged matrices, added up."""
    total = 0.0
    for name, entry in vector.tensors.items():
        moved, safety = task.read(name).float() - base.read(name).float(), vector.read(name)
        if len(entry.shape) == 2:
            total += published(moved.to(device), safety.float().to(device), n, GAMMA)
    return total


def delta(shape: Shape, spectrum: str, generator: torch.Generator) -> torch.Tensor:
    """A random delta of 1e-3 rms or so.

    *flat* ones are Gaussian; *decaying* ones have a few strong directions, as fine-tunes do, and
    climb to the second rung of the ladder of precisions.
    """
    rows, columns = shape
    noise = torch.randn(shape, generator=generator) * 1e-3
    if spectrum == "flat":
        return noise
    rank = min(shape) // 8
    left = torch.randn((rows, rank), generator=generator) * torch.logspace(0, -2, rank)
    strong = 0.02 * (left @ torch.randn((rank, columns), generator=generator))
    return (noise + strong) * 0.1  # a fine-tune's size beside weights of 0.05


def random_model(
    folder: Path, of: Architecture, scope: Scope = "attention+ffn"
) -> tuple[Path, Path, Path]:
    """Checkpoints of an architecture's layers, and a vector of that scope: (task, base, vector)."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (of.queries, of.hidden), "self_attn.o_proj": (of.hidden, of.queries),
        "self_attn.k_proj": (of.keys, of.hidden), "self_attn.v_proj": (of.keys, of.hidden),
        "mlp.gate_proj": (of.ffn, of.hidden), "mlp.up_proj": (of.ffn, of.hidden),
        "mlp.down_proj": (of.hidden, of.ffn),
    }  # fmt: skip
    weights = {
        f"model.layers.{layer}.{kind}.weight": torch.randn(shape, generator=generator) * 0.05
        for layer in range(of.layers)
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
        scope=scope,
    )
    return folder / "task", folder / "base", folder / "vector"
