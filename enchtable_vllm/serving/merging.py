"""The merge of one load: begun before vLLM has a model to load into, ended with its last tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from enchtable_vllm.merge import (
    Ahead,
    Merged,
    Recycled,
    TensorMerge,
    has_idle_core,
    populate,
)
from enchtable_vllm.serving.prepare import Prepared
from enchtable_vllm.vector import Delta

#: What may lie ready, if two tensors are not more: a few turns of merging and copying.
_AHEAD_BYTES = 64 * 2**20


class Merging:
    """Works ahead of vLLM, in threads.

    On the CPU it merges ahead: the task model's tensors are read from the very files that were
    checked, and those that vLLM hands over are not looked at. Elsewhere, and where vLLM may hand
    over something else than what those files hold, it reads and verifies the vector ahead, and
    merges what comes.

    Args:
        prepared: Checked inputs.
        device: Where vLLM puts the weights.
        reads_stored: Whether vLLM hands over what the checked files hold.
        verify_content: Whether every stored byte is checked against the plan.

    Attributes:
        merge_one: Merges a tensor.
        ahead: Takes one that was merged ahead, or None.
    """

    def __init__(
        self,
        prepared: Prepared,
        device: torch.device,
        *,
        reads_stored: bool,
        verify_content: bool,
    ) -> None:
        checkpoint, vector = prepared.task.checkpoint, prepared.vector
        names = sorted(  # as vLLM hands them over: one file after the other
            (name for name in checkpoint.tensors if name in prepared.resolved.coefficients),
            key=lambda name: (checkpoint.tensors[name].file, name),
        )
        budget = max(_AHEAD_BYTES, 2 * max(checkpoint.nbytes(name) for name in names))
        on_gpu = device.type == "cuda"
        self._on_cpu = device.type == "cpu"

        def merger(read: Callable[[str], Delta]) -> TensorMerge:
            return TensorMerge(
                prepared.resolved,
                vector,
                what=checkpoint.what,
                # On the GPU that the weights go to; elsewhere each tensor is merged where it is.
                device=device if on_gpu else None,
                read=read,
                masks=prepared.masks,
                rounding=prepared.config.rounding,
                verify_content=verify_content,
            )

        self.ahead: Callable[[str], Merged | None] = lambda _: None
        self._thread: Ahead[Merged] | Ahead[Delta]
        if reads_stored and not on_gpu:
            self.merge_one = one = merger(vector.read)
            memory = Recycled()
            merged = Ahead(
                lambda name: one.from_file(name, checkpoint, memory.empty),
                {name: checkpoint.nbytes(name) for name in names},
                budget,
                threads=max(1, torch.get_num_threads() - 1),
                beside=has_idle_core(),
            )
            self.ahead, self._thread = merged.take, merged
        else:
            deltas = Ahead(vector.read, {name: vector.nbytes(name) for name in names}, budget)
            self.merge_one = merger(lambda name: deltas.take(name) or vector.read(name))
            self._thread = deltas

    def begin(self, weights: Iterable[torch.Tensor]) -> None:
        """VLLM is about to copy into these."""
        if self._on_cpu:
            populate(weights)
        self._thread.fill()

    def close(self) -> None:
        """Stop working ahead."""
        self._thread.close()
