"""``safety_vector.json``: what a safety vector says of itself.

The tensors lie beside it, in ``safety_vector.safetensors`` or in shards with an index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from enchtable_kernels import scales_per_row
from enchtable_vllm.checkpoint import Checkpoint, Fingerprint, Location, sampled_fingerprint
from enchtable_vllm.vector.factors import Rung
from enchtable_vllm.vector.scope import Scope

VECTOR_MANIFEST = "safety_vector.json"
VECTOR_FILE_STEM = "safety_vector"
FACTORS_FILE_STEM = "safety_vector_factors"

#: What an int8 tensor's name is given for its scales.
SCALE = ".scale"

#: How many values of the aligned model a manifest holds for each tensor.
SAMPLE = 16

#: How deltas are stored, in safetensors' spelling.
VectorDtype = Literal["BF16", "F32", "I8"]
#: Not a literal, to which true would be 1.
FormatVersion = Annotated[int, Field(ge=1, le=1)]
FiniteNorm = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ModelReference(BaseModel):
    """A model that an artefact was made from.

    Attributes:
        id: A Hub id, or the name of a local folder (never a path).
        revision: The Hub commit, if there is one.
        fingerprint: Its sampled fingerprint.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str
    revision: str | None = None
    fingerprint: Fingerprint

    @classmethod
    def of(cls, location: Location, checkpoint: Checkpoint) -> ModelReference:
        """What identifies an opened checkpoint."""
        return cls(
            id=location.repo_id or location.path.name,
            revision=location.commit,
            fingerprint=sampled_fingerprint(checkpoint),
        )


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of an int8 tensor's scales."""
    return (*shape[:-1], scales_per_row(shape[-1] if shape else 1))


def spread_sample(tensor: torch.Tensor) -> torch.Tensor:
    """Up to `SAMPLE` values of a tensor, evenly spread, as fp32."""
    flat = tensor.reshape(-1)
    count = min(SAMPLE, flat.numel())
    places = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    return flat[places].float()


@dataclass(frozen=True)
class StoredTensor:
    """What a file must hold: a delta's values, or the scales of an int8 one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


class VectorTensor(BaseModel):
    """One delta.

    Attributes:
        shape: As stored.
        dtype: As stored, in safetensors' spelling. ``I8`` comes with a tensor ``NAME.scale``: fp32,
            one for each 64 elements of the last axis.
        norm: L2, of the values that the addition sees.
        digest: blake3 of every byte of the values.
        scale_digest: Of the scales, where there are any.
        aligned_sample: A few of the aligned model's own values, evenly spread: they tell, in any
            precision, whether a base model is the one this was built from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    shape: tuple[NonNegativeInt, ...]
    dtype: VectorDtype
    norm: FiniteNorm
    digest: Fingerprint
    scale_digest: Fingerprint | None = None
    aligned_sample: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        expected = min(SAMPLE, math.prod(self.shape))
        if len(self.aligned_sample) != expected:
            raise ValueError(f"aligned_sample must hold {expected} numbers")
        return self

    @model_validator(mode="after")
    def _scales_belong_to_int8(self) -> Self:
        if (self.dtype == "I8") != (self.scale_digest is not None):
            raise ValueError("I8 has a scale_digest, other dtypes have none")
        return self

    def stored(self, name: str) -> list[StoredTensor]:
        """What the files hold of it."""
        held = [StoredTensor(name, self.dtype, self.shape, self.digest)]
        if self.scale_digest is not None:
            held.append(
                StoredTensor(name + SCALE, "F32", scale_shape(self.shape), self.scale_digest)
            )
        return held


class MatrixFactors(BaseModel):
    """What `enchtable_vllm.vector.factors.Factors` of one matrix are stored beside the vector.

    Attributes:
        rung: Which algorithm the matrix needed.
        rank: How many directions there are; what lies beyond is zero.
        exponent: The factors are those of the delta times 2^−exponent.
        digest: blake3 over these three, γ, the delta's own digest, and the bytes of both factors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rung: Rung
    rank: Annotated[int, Field(ge=0)]
    exponent: int
    digest: Fingerprint


class CachedFactors(BaseModel):
    """Factors of every matrix of the vector: what a plan needs of it, computed ahead.

    Attributes:
        computation: Which version of the computation made them.
        device: ``cpu`` or ``cuda``: where they were computed.
        rank_fraction: γ.
        vector: The content fingerprint of the vector that they were computed from.
        tensors: Name → its matrices: one, or as many as the stack has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    computation: int
    device: Literal["cpu", "cuda"]
    rank_fraction: Annotated[float, Field(gt=0, le=1)]
    vector: Fingerprint
    tensors: dict[str, tuple[MatrixFactors, ...]]


class VectorManifest(BaseModel):
    """The whole file.

    Attributes:
        aligned, surrogate: The models it is the difference of.
        architecture: The first of ``architectures`` in the aligned model's config.
        format_version: Of this file.
        scope: Which parameters it was built for.
        norm: L2 over all deltas.
        zero_share: The share of elements that are exactly zero: high when it was built from 16-bit
            checkpoints.
        recipe: How the surrogate was made; free-form.
        tensors: The deltas, by the checkpoint's own tensor names.
        factors: What lies in ``safety_vector_factors*.safetensors``, if anything does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: FormatVersion = 1
    aligned: ModelReference
    surrogate: ModelReference
    architecture: str
    scope: Scope
    norm: FiniteNorm
    zero_share: Annotated[float, Field(ge=0, le=1)]
    recipe: dict[str, Any] = {}
    tensors: dict[str, VectorTensor]
    factors: CachedFactors | None = None
