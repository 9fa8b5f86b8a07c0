"""The merged stream: (name, stored tensor) in, (name, merged tensor) out.

The only place where a safety vector meets a weight. The vLLM loader, its reload and the
offline merge all pull their tensors through here, so they cannot differ.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from blake3 import blake3

from enchtable_kernels import FLOAT_DTYPES, Effect, fused_add
from enchtable_vllm.checkpoint import Checkpoint, combine_digests, tensor_digest
from enchtable_vllm.errors import (
    ConfigError,
    IncompleteMergeError,
    MergePlanError,
    MismatchError,
    NonFiniteError,
    SafetyVectorError,
    summarize_faults,
)
from enchtable_vllm.merge.report import MergeReport, Rounding
from enchtable_vllm.plan import MergeMasks, ResolvedPlan
from enchtable_vllm.vector import SafetyVector

#: Below this, handing a tensor to a thread and back costs more than the thread gives.
_WORTH_A_THREAD = 2**20
#: A norm of what is added, below which nothing is concluded from it.
_MEASURABLE = 1e-10


def check_rounding(rounding: Rounding, resolved: ResolvedPlan, task: Checkpoint) -> None:
    """Refuse stochastic rounding where it is not defined.

    Raises:
        ConfigError: A tensor to be merged is stored in fp16.
    """
    halves = [f"'{n}'" for n in resolved.coefficients if task.tensors[n].dtype == "F16"]
    if rounding == "stochastic" and halves:
        raise ConfigError(
            f"rounding 'stochastic' and {task.what}",
            expected="bf16 or fp32 where the plan merges",
            got=f"fp16: {summarize_faults(halves)}",
            fix="Round to nearest, or convert the checkpoint to bf16.",
        )


def _rounding_key(name: str) -> int:
    """64 bits of the name's hash: every rank, device and run draws the same noise."""
    return int.from_bytes(blake3(name.encode()).digest()[:8], "little")


class MergeStream:
    """One pass over a task model's tensors.

    Args:
        resolved: What to merge; its vector and task model already checked.
        vector: The safety vector.
        what: How an error message calls the stream's source.
        device: Where merging happens. A tensor that is elsewhere is moved there; None merges
            each tensor where it is.
        ahead_bytes: How far a thread of ours may be ahead of the consumer, in bytes of the
            source; 0 makes none. Reading, hashing and adding of large tensors then overlap with
            what the consumer does. Only for a source whose tensors stay valid while it goes on.
        may_filter: Whether the source may leave a planned tensor out (other ranks' experts).
        masks: Of the plan, if it has any.
        rounding: ``stochastic`` rounds bf16 up or down at random, with noise that depends on the
            tensor's name and the element's index alone. Experimental.
        foreign: Whether tensors that the plan does not know may come through untouched (a
            model's secondary weights).
        verify_content: Whether every stored byte is checked against the plan.
        digest_merged: Whether the merged bytes are digested, so that two merges can be compared.
        on_tensor: Called after each tensor, for a progress bar.
    """

    def __init__(
        self,
        resolved: ResolvedPlan,
        vector: SafetyVector,
        *,
        what: str,
        device: torch.device | None = None,
        ahead_bytes: int = 0,
        masks: MergeMasks | None = None,
        rounding: Rounding = "nearest",
        may_filter: Callable[[str], bool] = lambda _: False,
        foreign: bool = False,
        verify_content: bool = False,
        digest_merged: bool = False,
        on_tensor: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._resolved = resolved
        self._vector = vector
        self._what = what
        self._device = device
        self._ahead_bytes = ahead_bytes
        if (masks is None) != (resolved.plan.masks is None):
            raise MergePlanError(
                "merge plan",
                expected="its own masks" if masks is None else "no masks",
                got="none" if masks is None else "some",
                fix="Open them with 'open_masks'; a plan and its masks belong together.",
            )
        self._masks = masks
        self._rounding = rounding
        self._may_filter = may_filter
        self._foreign = foreign
        self._verify_content = verify_content
        self._digests: dict[str, str] | None = {} if digest_merged else None
        self._on_tensor = on_tensor
        self._seen: set[str] = set()
        self._sums: dict[str, torch.Tensor] = {}
        self._kept: set[str] = set()
        self._merged_bytes = 0
        #: Set when the stream has ended and everything planned was merged.
        self.report: MergeReport | None = None

    def merge(
        self, source: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the source's tensors, merged or as they are; then check that nothing is missing.

        Raises:
            MismatchError: A tensor that the plan does not know, or not of the planned shape.
            SafetyVectorError, NonFiniteError: A delta's bytes are wrong.
            IncompleteMergeError: The source ended without a tensor that was to be merged.
        """
        started = time.perf_counter()
        for name, merged in self._each_ahead(source) if self._ahead_bytes else self._each(source):
            yield name, merged
            self._on_tensor(name)
        self.report = self._finish(time.perf_counter() - started)

    def _each(
        self, source: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, stored in source:
            self._refuse_repeated(name)
            yield name, self._one(name, stored)

    def _each_ahead(
        self, source: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors in the same order; what is worth it is merged by one thread of ours."""
        waiting: deque[tuple[str, int, Future[torch.Tensor]]] = deque()
        waiting_bytes = 0
        on_our_stream = self._stream_of_this_thread()
        with ThreadPoolExecutor(1, thread_name_prefix="enchtable-merge") as worker:

            def one(name: str, stored: torch.Tensor) -> torch.Tensor:
                with on_our_stream():
                    return self._one(name, stored)

            try:
                for name, stored in source:
                    self._refuse_repeated(name)
                    if name in self._resolved.coefficients and stored.nbytes >= _WORTH_A_THREAD:
                        future = worker.submit(one, name, stored)
                    else:
                        future = Future()
                        future.set_result(self._one(name, stored))
                    waiting.append((name, stored.nbytes, future))
                    waiting_bytes += stored.nbytes
                    while waiting and (waiting[0][2].done() or waiting_bytes > self._ahead_bytes):
                        first, size, future = waiting.popleft()
                        waiting_bytes -= size
                        yield first, future.result()
                        del future
                while waiting:
                    first, _, future = waiting.popleft()
                    yield first, future.result()
                    del future
            finally:
                for _, _, future in waiting:
                    future.cancel()

    def _refuse_repeated(self, name: str) -> None:
        if name in self._seen:
            raise self._mismatch(name, "each tensor once", "it a second time")
        self._seen.add(name)

    def _stream_of_this_thread(self) -> Callable[[], AbstractContextManager[object]]:
        """The consumer's CUDA stream: work of another thread would not be ordered with it."""
        if self._device is None or self._device.type != "cuda":
            return nullcontext
        stream = torch.cuda.current_stream(self._device)
        return lambda: torch.cuda.stream(stream)

    def _one(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        planned = self._resolved.plan.tensors.get(name)
        if self._verify_content and planned is not None:
            digest = tensor_digest(stored)
            if digest != planned.task_digest:
                raise self._mismatch(name, f"content {planned.task_digest}", digest)
        coefficients = self._resolved.coefficients.get(name)
        if coefficients is None:
            if name not in self._resolved.kept and not self._foreign:
                raise self._mismatch(name, "a tensor of the merge plan", "one it does not know")
            self._kept.add(name)
            return stored
        shape = self._vector.tensors[name].shape
        if tuple(stored.shape) != shape or stored.dtype not in FLOAT_DTYPES:
            raise self._mismatch(
                name,
                f"shape {list(shape)} in bf16, fp16 or fp32",
                f"{list(stored.shape)} in {stored.dtype}",
            )
        delta = self._vector.read(name)
        if self._device is not None:
            stored = stored.to(self._device)
        delta = delta.to(stored.device)
        keep_bits = self._masks.read(name, stored.numel()) if self._masks else None
        merged, sums = fused_add(
            stored,
            delta.values,
            coefficients,
            scales=delta.scales,
            # The delta's memory is ours, and read no more after this.
            out=delta.values if delta.values.dtype == stored.dtype else None,
            keep_bits=None if keep_bits is None else keep_bits.to(stored.device),
            rounding_key=_rounding_key(name) if self._rounding == "stochastic" else None,
        )
        self._sums[name] = sums
        self._merged_bytes += merged.nbytes
        if self._digests is not None:
            self._digests[name] = tensor_digest(merged)
        return merged

    def _finish(self, seconds: float) -> MergeReport:
        absent = self._resolved.coefficients.keys() - self._sums.keys()
        lost = sorted(name for name in absent if not self._may_filter(name))
        if lost or not self._sums:
            missing = summarize_faults([f"'{name}'" for name in lost])
            raise IncompleteMergeError(
                self._what,
                expected=f"all {len(self._resolved.coefficients)} tensors of the merge plan",
                got=f"{len(self._sums)}; missing: {missing}",
                fix="The weights that were read are not those that were planned for; nothing may "
                "be served from them. If the folder also holds weights under other names "
                '(consolidated*.safetensors), set "inner_load_format": "hf".',
            )
        # One wait for the device, after the last tensor.
        effects = {name: Effect.from_tensor(sums) for name, sums in self._sums.items()}
        bad = [f"'{n}' has {e.non_finite}" for n, e in effects.items() if e.non_finite]
        if bad:
            self._blame_the_vector(effects)
            raise NonFiniteError(
                f"{self._what}, merged weights",
                expected="finite values",
                got=summarize_faults(bad),
                fix="Either the task model holds NaN or infinity, or beta is far too large.",
            )
        self._check_norms(effects)
        report = MergeReport(
            self._resolved,
            effects,
            rounding=self._rounding,
            kept=len(self._kept),
            filtered=len(absent),
            merged_bytes=self._merged_bytes,
            seconds=seconds,
            merged_digest=combine_digests(self._digests) if self._digests else None,
        )
        if report.total.added_sq == 0.0:
            raise IncompleteMergeError(
                f"{self._what}, merged weights",
                expected="weights that differ from the task model's",
                got=f"none that does, at beta {self._resolved.beta:g}",
                fix="The additions rounded to nothing: beta is far too small, or so large that "
                "interference attenuates everything away.",
            )
        return report

    def _check_norms(self, effects: dict[str, Effect]) -> None:
        """What was added has the norm that the manifest promises; the sums tell, at no cost.

        A stack's coefficients bound it from both sides, a mask only takes away from it.
        """
        faults = []
        for name, effect in effects.items():
            row, norm = self._resolved.coefficients[name], self._vector.tensors[name].norm
            least = 0.0 if self._masks else min(row) * norm
            most = max(row) * norm
            added = math.sqrt(effect.intended_sq)
            # Squares of far smaller numbers vanish in fp32, and so does what is added.
            if most > _MEASURABLE and not least * 0.999 <= added <= most * 1.001:
                faults.append(f"'{name}' has {added / max(row):.6g} where it says {norm:.6g}")
        if faults:
            raise SafetyVectorError(
                self._vector.what,
                expected="norms as the manifest says",
                got=summarize_faults(faults),
                fix="The manifest was edited: fetch or build the vector again.",
            )

    def _blame_the_vector(self, effects: dict[str, Effect]) -> None:
        """Read again what was not finite, to tell a bad vector from a bad task model or β."""
        for name, effect in effects.items():
            if effect.non_finite and not bool(
                torch.isfinite(self._vector.read(name).float()).all()
            ):
                raise NonFiniteError(
                    f"{self._vector.what}, tensor '{name}'",
                    expected="finite values",
                    got="NaN or infinity",
                    fix="Distil it again; a diverged surrogate makes such a vector.",
                )

    def _mismatch(self, name: str, expected: str, got: str) -> MismatchError:
        return MismatchError(
            f"{self._what}, tensor '{name}'",
            expected=expected,
            got=got,
            fix="Make the plan again for this model: 'enchtable plan'.",
        )
