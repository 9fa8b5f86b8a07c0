"""Old and new tensors in host memory, ready to be put in, before anything is touched.

Both are merged anew from the task model's stored weights: the difference of two vectors, added
to weights that are rounded already, would drift.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from enchtable_vllm.checkpoint import combine_digests, tensor_digest
from enchtable_vllm.merge import MergeReport, MergeStream, TensorMerge, under_both_names
from enchtable_vllm.serving.prepare import OpenTask, Prepared
from enchtable_vllm.serving.swap.host_memory import HostPages, refuse_too_much


class StagingCancelled(Exception):
    """Nobody waits for it any more."""


@dataclass(frozen=True)
class Side:
    """One of the two: what the tensors would be with a vector.

    Attributes:
        tensors: Checkpoint name → merged tensor on the CPU.
        digest: Over all of them. Equal on two ranks that hold the same.
        report: What merging did; None: no vector.
    """

    tensors: dict[str, torch.Tensor]
    digest: str
    report: MergeReport | None


@dataclass(frozen=True)
class Staged:
    """Both sides, over the same names."""

    old: Side
    new: Side
    seconds: float

    @property
    def nbytes(self) -> int:
        """Host memory that is held."""
        sides = (self.old.tensors, self.new.tensors)
        return sum(tensor.nbytes for side in sides for tensor in side.values())


_EMPTY = Side({}, combine_digests({}), None)
#: From no vector to no vector, or to the very one that is served.
NOTHING = Staged(_EMPTY, _EMPTY, 0.0)


@dataclass(frozen=True)
class StagingJob:
    """What staging needs to know of its rank.

    Attributes:
        task: The task model, opened anew; it must still be the one that is served.
        old, new: Prepared; None: no vector.
        ranks: How many share this machine's memory.
        staging_gib: The bound on all of them together, if one is set.
        verify_content: Whether every stored byte is checked against the plan.
        served: The dtype that the model is served in.
        cancelled: Set when nobody waits any more.
    """

    task: OpenTask
    old: Prepared | None
    new: Prepared | None
    ranks: int
    staging_gib: float | None
    verify_content: bool
    served: torch.dtype
    cancelled: threading.Event

    def run(self) -> Staged:
        """Read, verify and merge both sides.

        Raises:
            EnchTableError: Something does not fit, is not what it was, or would take too much
                memory.
            StagingCancelled: It was.
        """
        started = time.perf_counter()
        names = self.names()
        if not names:
            return NOTHING
        sizes = (self.task.checkpoint.nbytes(name) for name in names)
        size = sum(HostPages.size_of(nbytes) for nbytes in sizes)
        refuse_too_much(2 * size, self.ranks, self.staging_gib)
        old, new = (self._side(side, names, size) for side in (self.old, self.new))
        self.task.checkpoint.refuse_changed()
        return Staged(old, new, time.perf_counter() - started)

    def names(self) -> list[str]:
        """Whatever either vector changes, and all that vLLM could fuse it with.

        A layer that is given a part of its tensors is left with memory that nobody initialised.
        """
        changed = {
            name for side in (self.old, self.new) if side for name in side.resolved.coefficients
        }
        blocks = {block_of(name) for name in changed}
        stored = self.task.checkpoint.tensors
        return [name for name in stored if block_of(name) in blocks]

    def _side(self, prepared: Prepared | None, names: list[str], nbytes: int) -> Side:
        checkpoint, pages = self.task.checkpoint, HostPages(nbytes)

        def stored() -> Iterator[tuple[str, torch.Tensor]]:
            for name in names:
                if self.cancelled.is_set():
                    raise StagingCancelled
                yield name, checkpoint.read(name)

        def held(pairs: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in pairs:
                yield name, pages.copy(tensor)

        stream = None
        if prepared is not None:
            merge_one = TensorMerge(
                prepared.resolved,
                prepared.vector,
                what=checkpoint.what,
                masks=prepared.masks,
                rounding=prepared.config.rounding,
                verify_content=self.verify_content,
            )
            stream = MergeStream(merge_one, served=self.served)
        tensors = dict(
            under_both_names(
                lambda pairs: held(stream.merge(pairs) if stream else pairs),
                stored(),
                checkpoint.second_names,
            )
        )
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        return Side(tensors, combine_digests(digests), stream.report if stream else None)


def block_of(name: str) -> str:
    """The part of a layer that a tensor belongs to: ``model.layers.3.self_attn``.

    VLLM fuses query, key and value, gate and up, the experts of a layer: always within one
    such part. What lies in no numbered layer is a part of its own, less its last segment.
    """
    segments = name.split(".")
    for i, segment in enumerate(segments[:-2]):
        if segment.isdecimal():
            return ".".join(segments[: i + 2])
    return ".".join(segments[:-1])
