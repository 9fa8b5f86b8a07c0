"""A merge as a LoRA adapter: what of it a low rank holds.

PEFT's format, so that vLLM loads it: ``adapter_config.json`` and two factors for each matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from enchtable_vllm.checkpoint import Checkpoint

_PREFIX = "base_model.model."


def merged_deltas(task: Path, merged: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name → merged − task in fp32, of each matrix that the merge changed."""
    before, after = Checkpoint(task), Checkpoint(merged)
    for name in before.tensors:
        delta = after.read(name).float() - before.read(name).float()
        if delta.ndim == 2 and delta.any():
            yield name, delta


def write_nearest(task: Path, merged: Path, rank: int, folder: Path) -> float:
    """The adapter of a rank that is nearest to a merge: a truncated SVD of each delta.

    Args:
        task: The task model.
        merged: It, merged offline.
        rank: Of both factors. Where a matrix has fewer directions, zeros follow.
        folder: Where it is written.

    Returns:
        The captured energy: ‖BA‖² / ‖Δ‖², of the factors as stored, in bf16.

    Source:
        Eckart and Young, 1936: no other matrices of that rank are nearer.
    """
    factors, captured, whole = {}, 0.0, 0.0
    for name, delta in merged_deltas(task, merged):
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        kept = min(rank, len(values))
        root = values[:kept].sqrt()
        down = torch.zeros(rank, delta.shape[1], dtype=torch.bfloat16)
        up = torch.zeros(delta.shape[0], rank, dtype=torch.bfloat16)
        down[:kept] = root[:, None] * right[:kept]
        up[:, :kept] = left[:, :kept] * root
        factors[name] = (down, up)
        captured += float((up.float() @ down.float()).square().sum())
        whole += float(delta.square().sum())
    _write(task, factors, rank, folder)
    return captured / whole


def write_random(task: Path, merged: Path, rank: int, folder: Path) -> None:
    """Small random factors for the same matrices: costs what a trained adapter costs."""
    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 1e-3).bfloat16()

    factors = {
        name: (factor(rank, delta.shape[1]), factor(delta.shape[0], rank))
        for name, delta in merged_deltas(task, merged)
    }
    _write(task, factors, rank, folder)


def _write(
    task: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], rank: int, folder: Path
) -> None:
    from peft import LoraConfig

    parts = {name.removesuffix(".weight"): pair for name, pair in factors.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({name.rpartition(".")[2] for name in parts}),
        base_model_name_or_path=str(task),
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(str(folder))
    tensors = {
        f"{_PREFIX}{name}.lora_{letter}.weight": factor
        for name, pair in parts.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
