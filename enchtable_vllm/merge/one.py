"""One tensor of the task model and one of the safety vector, merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from blake3 import blake3

from enchtable_kernels import FLOAT_DTYPES, fused_add, fused_add_as_read
from enchtable_vllm.checkpoint import TORCH_DTYPES, Checkpoint, tensor_digest
from enchtable_vllm.errors import MergePlanError, MismatchError
from enchtable_vllm.merge.report import Rounding
from enchtable_vllm.plan import MergeMasks, ResolvedPlan
from enchtable_vllm.vector import Delta, SafetyVector

#: Makes a tensor of a shape and a dtype, its values whatever they are.
Out = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class Merged(NamedTuple):
    """What comes of it.

    Attributes:
        tensor: Of the stored tensor's shape and dtype.
        sums: ``[4]`` float64, for `enchtable_kernels.Effect.from_tensor`; on the tensor's device.
    """

    tensor: torch.Tensor
    sums: torch.Tensor


class TensorMerge:
    """Merges one tensor at a time; from any thread, in any order, with the same bits.

    Args:
        resolved: What to merge; its vector and task model already checked.
        vector: The safety vector.
        what: How an error message calls the task model.
        device: Where merging happens. A tensor that is elsewhere is moved there; None merges
            each tensor where it is.
        read: Reads a delta of the vector; by default the vector does.
        masks: Of the plan, if it has any.
        rounding: ``stochastic`` rounds bf16 up or down at random, with noise that depends on the
            tensor's name and the element's index alone. Experimental.
        verify_content: Whether every stored byte is checked against the plan.

    Raises:
        MergePlanError: Plan and masks do not belong together.
    """

    def __init__(
        self,
        resolved: ResolvedPlan,
        vector: SafetyVector,
        *,
        what: str,
        device: torch.device | None = None,
        read: Callable[[str], Delta] | None = None,
        masks: MergeMasks | None = None,
        rounding: Rounding = "nearest",
        verify_content: bool = False,
    ) -> None:
        if (masks is None) != (resolved.plan.masks is None):
            raise MergePlanError(
                "merge plan",
                expected="its own masks" if masks is None else "no masks",
                got="none" if masks is None else "some",
                fix="Open them with 'open_masks'; a plan and its masks belong together.",
            )
        self.resolved = resolved
        self.vector = vector
        self.what = what
        self.masks = masks
        self.rounding = rounding
        self._device = device
        self._read = read or vector.read
        self._verify_content = verify_content

    def verify(self, name: str, stored: torch.Tensor) -> None:
        """Check a stored tensor's bytes against the plan, if that is asked for.

        Raises:
            MismatchError: They are others.
        """
        if self._verify_content:
            self._refuse_other_content(name, tensor_digest(stored))

    def __call__(self, name: str, stored: torch.Tensor) -> Merged:
        """Merge a tensor that the plan merges.

        Args:
            name: Its name in the checkpoint.
            stored: As it is stored; left as it is.

        Raises:
            MismatchError: Its shape, its dtype or, if verified, its content is not what was
                planned for.
            SafetyVectorError, CheckpointError: The delta cannot be read as it should be.
        """
        self.verify(name, stored)
        shape = self.vector.tensors[name].shape
        if tuple(stored.shape) != shape or stored.dtype not in FLOAT_DTYPES:
            raise self.mismatch(
                name,
                f"shape {list(shape)} in bf16, fp16 or fp32",
                f"{list(stored.shape)} in {stored.dtype}",
            )
        delta = self._read(name)
        if self._device is not None:
            stored = stored.to(self._device)
        delta = delta.to(stored.device)
        keep_bits = self.masks.read(name, stored.numel()) if self.masks else None
        return Merged(
            *fused_add(
                stored,
                delta.values,
                self.resolved.coefficients[name],
                scales=delta.scales,
                # The delta's memory is ours, and read no more after this.
                out=delta.values if delta.values.dtype == stored.dtype else None,
                keep_bits=None if keep_bits is None else keep_bits.to(stored.device),
                rounding_key=self._rounding_key(name),
            )
        )

    def from_file(self, name: str, task: Checkpoint, out: Out | None = None) -> Merged:
        """Merge what a checkpoint stores, on the CPU; the same bits as of the tensor itself.

        Args:
            name: Its name in the checkpoint.
            task: The checkpoint, of safetensors or not.
            out: Makes the tensor that is merged into; by default, in new memory.

        Raises:
            MismatchError, SafetyVectorError, CheckpointError: As `__call__`.
        """
        header, shape = task.tensors[name], self.vector.tensors[name].shape
        if header.shape != shape or not header.is_float or 0 in shape:
            return self(name, task.read(name))  # which says what is wrong with it
        dtype = TORCH_DTYPES[header.dtype]
        merged = out(shape, dtype) if out else torch.empty(shape, dtype=dtype)
        hasher = blake3()

        with self.vector.reader(name) as read_delta:

            def read(first: int, stored: memoryview, delta: memoryview) -> None:
                task.read_into(name, first * merged.itemsize, stored)
                if self._verify_content:
                    hasher.update(stored)
                read_delta(delta)

            sums = fused_add_as_read(
                read,
                self.vector.dtype(name),
                self.resolved.coefficients[name],
                merged,
                scales=self.vector.scales(name),
                keep_bits=self.masks.read(name, merged.numel()) if self.masks else None,
                rounding_key=self._rounding_key(name),
            )
        if self._verify_content:
            self._refuse_other_content(name, f"blake3:{hasher.hexdigest()}")
        return Merged(merged, sums)

    def mismatch(self, name: str, expected: str, got: str) -> MismatchError:
        """A stored tensor that is not what was planned for."""
        return MismatchError(
            f"{self.what}, tensor '{name}'",
            expected=expected,
            got=got,
            fix="Make the plan again for this model: 'enchtable plan'.",
        )

    def _refuse_other_content(self, name: str, digest: str) -> None:
        planned = self.resolved.plan.tensors.get(name)
        if planned is not None and digest != planned.task_digest:
            raise self.mismatch(name, f"content {planned.task_digest}", digest)

    def _rounding_key(self, name: str) -> int | None:
        """64 bits of the name's hash: every rank, device and run draws the same noise."""
        if self.rounding == "nearest":
            return None
        return int.from_bytes(blake3(name.encode()).digest()[:8], "little")
