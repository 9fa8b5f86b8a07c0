"""Merge plans of any shape, whose numbers follow from each other as a real plan's do."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable

from enchtable_vllm.plan import MergePlan
from enchtable_vllm.plan.resolve import coefficient, norm_scale

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
FFN = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))


def digest(seed: int = 0) -> str:
    return "blake3:" + random.Random(seed).randbytes(32).hex()


def dense(layers: int = 80, modules: Iterable[str] = ATTENTION + FFN) -> list[str]:
    """The names of a dense model's matrices: 80 layers of 7, as one of 70B parameters has."""
    return [f"model.layers.{n}.{module}.weight" for n in range(layers) for module in modules]


def mixture(layers: int = 48, experts: int = 64) -> list[str]:
    """Of a mixture of experts, each a tensor of its own."""
    expert = [f"mlp.experts.{n}.{m}_proj" for n in range(experts) for m in ("gate", "up", "down")]
    return dense(layers, (*ATTENTION, "mlp.gate", *expert))


def make_plan(
    merged: Iterable[str],
    *,
    kept: dict[str, str] | None = None,
    unused: dict[str, str] | None = None,
    stack: int = 1,
    retained: bool = True,
    beta: float = 0.5,
    strength: float = 0.4,
    seed: int = 0,
    **names: str,
) -> MergePlan:
    """A plan that merges these tensors.

    Args:
        merged: Their names.
        kept, unused: Name → why.
        stack: Matrices in each tensor.
        retained: Whether it says what is expected to survive rounding.
        beta: β.
        strength: About the interference of the last layer; the first has the least.
        seed: Of the noise.
        names: ``task``, ``base``, ``vector``: in place of the usual ones.
    """
    chance = random.Random(seed)
    merged = list(merged)
    norms = [chance.uniform(0.5, 2.0) for _ in merged]
    n, safety_norm = norm_scale(beta, 30.0, norms)
    tensors: dict[str, object] = {}
    for place, (name, norm) in enumerate(zip(merged, norms, strict=True)):
        depth = (place + 1) / len(merged)
        wanted = [strength * depth * chance.uniform(0.4, 1.6) for _ in range(stack)]
        a = [0.7 * x / n for x in wanted]
        b = [0.3 * x for x in wanted]
        interference = [a_ * n + b_ for a_, b_ in zip(a, b, strict=True)]
        tensors[name] = {
            "action": "merge",
            "task_digest": digest(place),
            "safety_norm": norm,
            "a": a,
            "b": b,
            "interference": interference,
            "attenuation": [math.exp(-x) for x in interference],
            "coefficient": [coefficient(n, *pair) for pair in zip(a, b, strict=True)],
            "rungs": [["gram32" if place % 9 else "svd64", "gram64"]] * stack,
            "retained_share": chance.uniform(0.9, 1.0) if retained else None,
        }
    for name, why in (kept or {"model.norm.weight": "not in the safety vector"}).items():
        tensors[name] = {"action": "keep", "task_digest": digest(), "reason": why}
    return MergePlan.model_validate_json(
        json.dumps(
            {
                "task_model": {"id": names.get("task", "llama-tuned"), "fingerprint": digest(1)},
                "base_model": {"id": names.get("base", "llama-base"), "fingerprint": digest(2)},
                "safety_vector": {
                    "name": names.get("vector", "safety-vector"),
                    "fingerprint": digest(3),
                },
                "beta": beta,
                "rank_fraction": 0.5,
                "scope": "all",
                "task_norm": 30.0,
                "safety_norm": safety_norm,
                "norm_scale": n,
                "retained_share": 0.95,
                "unused": unused or {},
                "tensors": tensors,
            }
        )
    )
