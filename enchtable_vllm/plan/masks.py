"""Masks: which elements of a delta take part. An option; the method as published has none.

A mask only leaves elements out: coefficients stay those of the whole delta, so nothing is ever
added that a plan without masks would not add. Packed, one bit an element, in a folder beside
the plan; not in the plan's own folder, where vLLM would take the file for weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from enchtable_kernels import unpack_keep
from enchtable_vllm.checkpoint import (
    Checkpoint,
    FolderTransaction,
    ShardWriter,
    TensorHeader,
    tensor_digest,
)
from enchtable_vllm.errors import ConfigError, MergePlanError
from enchtable_vllm.plan.merge_plan import MASKS_STEM, MaskReference, MergePlan


@dataclass(frozen=True)
class MaskOptions:
    """What a user may choose.

    Attributes:
        density: Keep this share of each delta, the largest magnitudes; None keeps all.
        drop_sign_conflicts: Leave out where the safety and the task vector disagree in sign.
    """

    density: float | None = None
    drop_sign_conflicts: bool = False

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(
                "density",
                expected="a number above 0, at most 1",
                got=self.density,
                fix="It is the share of each delta's elements that is kept.",
            )

    def __bool__(self) -> bool:
        return self.density is not None or self.drop_sign_conflicts


def keep_mask(safety: torch.Tensor, task: torch.Tensor, options: MaskOptions) -> torch.Tensor:
    """Which elements are merged.

    Args:
        safety: The delta, any shape, fp32.
        task: The task vector's tensor of that shape, fp32.
        options: At least one must be chosen.

    Returns:
        Bool, of the same shape. Of equal magnitudes the first in row-major order are kept, so
        that exactly ``ceil(density · count)`` are, whatever computes it.
    """
    keep = torch.ones(safety.shape, dtype=torch.bool, device=safety.device)
    if options.density is not None:
        magnitude = safety.abs().flatten()
        wanted = math.ceil(options.density * magnitude.numel())
        if wanted < magnitude.numel():
            least = magnitude.kthvalue(magnitude.numel() - wanted + 1).values
            above, ties = magnitude > least, magnitude == least
            ties &= ties.cumsum(0) <= wanted - above.sum()
            keep = (above | ties).view(safety.shape)
    if options.drop_sign_conflicts:
        keep &= torch.signbit(safety) == torch.signbit(task)
        keep |= (safety == 0) | (task == 0)
    return keep


class MaskWriter(ExitStack[None]):
    """Writes a plan's masks, one at a time.

    Use as a context manager, around the making of the plan: what is written appears whole, when
    it is left, or not at all.

    Args:
        plan_path: The plan's file; its masks go to ``NAME.masks`` beside it.
    """

    def __init__(self, plan_path: Path) -> None:
        super().__init__()
        self.folder = plan_path.with_suffix(".masks")
        self._transaction = FolderTransaction(self.folder, overwrite=True)
        self._writer: ShardWriter | None = None
        self._kept = self._count = 0

    def __enter__(self) -> Self:
        self._partial = self.enter_context(self._transaction)
        return super().__enter__()

    def begin(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Name the tensors that will come."""
        self._counts = {name: math.prod(shape) for name, shape in shapes.items()}
        headers = [
            TensorHeader(name, "U8", ((count + 7) // 8,), "")
            for name, count in self._counts.items()
        ]
        path = self._partial / f"{MASKS_STEM}.safetensors"
        self._writer = self.enter_context(ShardWriter(path, headers, {"format": "pt"}))

    def write(self, name: str, keep_bits: torch.Tensor) -> str:
        """One tensor's packed bits; returns their digest."""
        assert self._writer is not None, "begin comes first"
        self._writer.write(name, keep_bits)
        count = self._counts[name]
        self._count += count
        self._kept += int(unpack_keep(keep_bits, 0, count).sum())
        return tensor_digest(keep_bits)

    def finish(self, options: MaskOptions) -> MaskReference:
        """What the plan says of them, when all are written."""
        return MaskReference(
            path=self.folder.name,
            density=options.density,
            drop_sign_conflicts=options.drop_sign_conflicts,
            kept_share=round(self._kept / self._count, 6),
        )


class MergeMasks:
    """The masks of a plan, opened; each is verified on the bytes that are used.

    Args:
        plan: One that has masks.
        path: Its file.

    Raises:
        MergePlanError: The folder leads elsewhere, or a mask is missing or of another size.
        CheckpointError: Its file is missing or damaged.
    """

    def __init__(self, plan: MergePlan, path: Path) -> None:
        assert plan.masks is not None
        folder = path.parent / plan.masks.path
        self._plan, self._what = plan, f"merge plan '{path}', masks"
        if not folder.resolve().is_relative_to(path.parent.resolve()):
            raise MergePlanError(
                self._what,
                expected="a folder inside the plan's own",
                got=f"'{plan.masks.path}', a link to '{folder.resolve()}'",
                fix="Put the masks beside the plan again, or make the plan again.",
            )
        self._file = Checkpoint(folder, stem=MASKS_STEM, what="merge masks")
        wrong = sorted(plan.merged.keys() ^ self._file.tensors.keys())
        if wrong:
            raise MergePlanError(
                self._what,
                expected="a mask for every merged tensor and no other",
                got=f"a difference in {len(wrong)}, such as '{wrong[0]}'",
                fix="Make the plan again with 'enchtable plan'.",
            )

    def read(self, name: str, count: int) -> torch.Tensor:
        """``[ceil(count / 8)]`` uint8: a tensor's keep-bits, in memory of their own.

        Raises:
            MergePlanError: They are not those that the plan was made with.
        """
        bits = self._file.read(name).clone()
        digest, expected = tensor_digest(bits), self._plan.tensors[name].keep_digest
        if digest != expected or bits.numel() != (count + 7) // 8:
            raise MergePlanError(
                f"{self._what}, tensor '{name}'",
                expected=f"{(count + 7) // 8} bytes of content {expected}",
                got=f"{bits.numel()} of {digest}",
                fix="Restore the file, or make the plan again with 'enchtable plan'.",
            )
        return bits


def open_masks(plan: MergePlan, path: Path) -> MergeMasks | None:
    """The masks of a plan file, or None where it has none."""
    return None if plan.masks is None else MergeMasks(plan, path)
