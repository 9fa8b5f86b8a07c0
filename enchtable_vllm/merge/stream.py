"""The merged stream: (name, stored tensor) in, (name, merged tensor) out.

The only place where a safety vector meets a weight. The vLLM loader, its reload and the
offline merge all pull their tensors through here, so they cannot differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from enchtable_kernels import Effect
from enchtable_vllm.checkpoint import Checkpoint, combine_digests, tensor_digest
from enchtable_vllm.errors import (
    ConfigError,
    IncompleteMergeError,
    NonFiniteError,
    SafetyVectorError,
    summarize_faults,
)
from enchtable_vllm.merge.one import Merged, TensorMerge
from enchtable_vllm.merge.report import MergeReport, Rounding
from enchtable_vllm.merge.served import sums_as_served
from enchtable_vllm.plan import ResolvedPlan, beyond_measure

#: A norm of what is added, below which nothing is concluded from it.
_MEASURABLE = 1e-10
#: Its square is near fp32's end.
_BEYOND_MEASURE = 1e18


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


class MergeStream:
    """One pass over a task model's tensors.

    Args:
        merge_one: Merges a tensor.
        ahead: Takes what was merged ahead of the pass, from the same stored bytes; None for a
            tensor whose turn it has not been.
        may_filter: Whether the source may leave a planned tensor out (other ranks' experts).
        foreign: Whether tensors that the plan does not know may come through untouched (a
            model's secondary weights).
        served: The dtype that whoever takes the tensors converts them to; None: theirs.
        digest_merged: Whether the merged bytes are digested, so that two merges can be compared.
        on_tensor: Called after each tensor, for a progress bar.
    """

    def __init__(
        self,
        merge_one: TensorMerge,
        *,
        ahead: Callable[[str], Merged | None] = lambda _: None,
        may_filter: Callable[[str], bool] = lambda _: False,
        foreign: bool = False,
        served: torch.dtype | None = None,
        digest_merged: bool = False,
        on_tensor: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._merge_one = merge_one
        self._resolved = merge_one.resolved
        self._vector = merge_one.vector
        self._what = merge_one.what
        self._ahead = ahead
        self._may_filter = may_filter
        self._foreign = foreign
        self._served = served
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
        for name, stored in source:
            if name in self._seen:
                raise self._merge_one.mismatch(name, "each tensor once", "it a second time")
            self._seen.add(name)
            yield name, self._one(name, stored)
            self._on_tensor(name)
        self.report = self._finish(time.perf_counter() - started)

    def _one(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        if name not in self._resolved.coefficients:
            self._merge_one.verify(name, stored)
            if name not in self._resolved.kept and not self._foreign:
                raise self._merge_one.mismatch(
                    name, "a tensor of the merge plan", "one it does not know"
                )
            self._kept.add(name)
            return stored
        merged, sums = self._ahead(name) or self._merge_one(name, stored)
        if (merged.shape, merged.dtype) != (stored.shape, stored.dtype):
            raise self._merge_one.mismatch(
                name,
                f"{list(merged.shape)} in {merged.dtype}, as its file says",
                f"{list(stored.shape)} in {stored.dtype}",
            )
        self._sums[name] = sums_as_served(sums, stored, merged, self._served)
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
            rounding=self._merge_one.rounding,
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
                got=f"none that does, at beta {self._resolved.beta:g}"
                + (f" and served in {self._served}" if self._served else ""),
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
            least = 0.0 if self._merge_one.masks else min(row) * norm
            most = max(row) * norm
            added = math.sqrt(effect.intended_sq)
            if least > _BEYOND_MEASURE:
                raise beyond_measure(
                    self._resolved.beta, f"an addition of norm {most:g} to '{name}'"
                )
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
