"""``merge_plan.json``: small, reviewable, deterministic; a line for each tensor."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from enchtable_vllm.checkpoint import Fingerprint
from enchtable_vllm.checkpoint.location import REPO_ID
from enchtable_vllm.vector import ModelReference, Scope
from enchtable_vllm.vector.factors import Rung
from enchtable_vllm.vector.format import FormatVersion

PLAN_FILE = "merge_plan.json"
#: ``keep_bits.safetensors``, in a folder of its own.
MASKS_STEM = "keep_bits"

Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(allow_inf_nan=False)]


class VectorLocation(BaseModel):
    """Where the vector is: inside the plan's own folder, or on the Hub at a commit.

    Attributes:
        path: Relative to the plan's folder; never absolute, never upwards.
        repo_id: A Hub repository.
        commit: Of that repository: 40 hex digits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: str | None = None
    repo_id: Annotated[str, StringConstraints(pattern=REPO_ID)] | None = None
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.path is None) == (self.repo_id is None) or (
            (self.repo_id is None) != (self.commit is None)
        ):
            raise ValueError("give either 'path', or 'repo_id' and 'commit'")
        if self.path is not None:
            _leads_inside(self.path)
        return self


def _leads_inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    odd = set(path) & set("\\\0~")
    if PurePosixPath(path).is_absolute() or ".." in parts or odd or not parts:
        raise ValueError("'path' must lead into the plan's own folder")
    return path


class MaskReference(BaseModel):
    """Where the masks of a plan are, and how they were chosen.

    Attributes:
        path: A folder inside the plan's own; it holds ``keep_bits.safetensors``.
        density: The share of each delta, by magnitude, that is kept. Absent: all of it.
        drop_sign_conflicts: Whether elements are left out where the safety and the task vector
            disagree in sign.
        kept_share: Of all elements of the merged tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[str, AfterValidator(_leads_inside)]
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    drop_sign_conflicts: bool = False
    kept_share: Annotated[float, Field(ge=0, le=1)]


class VectorReference(BaseModel):
    """The safety vector a plan was made for.

    Attributes:
        name: For people.
        fingerprint: Its content fingerprint.
        location: Absent where the vector must be named when the plan is used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    fingerprint: Fingerprint
    location: VectorLocation | None = None


class PlannedTensor(BaseModel):
    """What happens to one of the task model's tensors.

    Lists hold one number for a matrix, and for a stack of experts one for each of its matrices.

    Attributes:
        action: Whether it is merged or kept bit for bit.
        task_digest: blake3 of the task tensor's every byte.
        reason: Why it is kept.
        safety_norm: ‖S‖₂ of this delta.
        a, b: Interference = a · norm scale + b.
        interference, attenuation, coefficient: At the plan's own β and scope.
        rungs: Which algorithm each matrix's factors needed: task's, safety's.
        keep_digest: blake3 of its packed mask, where the plan has masks.
        retained_share: Expected after rounding to the task tensor's dtype.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    action: Literal["merge", "keep"]
    task_digest: Fingerprint
    reason: str | None = None
    safety_norm: Finite | None = None
    a: tuple[Finite, ...] = ()
    b: tuple[Finite, ...] = ()
    interference: tuple[Finite, ...] = ()
    attenuation: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    coefficient: tuple[Finite, ...] = ()
    rungs: tuple[tuple[Rung, Rung], ...] = ()
    keep_digest: Fingerprint | None = None
    retained_share: Share | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        numbers = (self.a, self.b, self.interference, self.attenuation, self.coefficient)
        lengths = {len(column) for column in numbers}
        if self.action == "keep":
            if lengths != {0} or not self.reason:
                raise ValueError("a kept tensor has a reason and no coefficients")
        elif len(lengths) != 1 or lengths == {0} or self.safety_norm is None:
            raise ValueError(
                "a merged tensor needs safety_norm and, for each of its matrices, "
                "a, b, interference, attenuation and coefficient"
            )
        return self


class MergePlan(BaseModel):
    """The whole file.

    Attributes:
        format_version: Of this file.
        task_model, base_model, safety_vector: What it was made for, by fingerprint.
        beta: β.
        rank_fraction: γ.
        scope: Which parameters take part.
        task_norm: ‖T‖₂ over every stored tensor of one shape in task and base model.
        safety_norm: ‖S‖₂ over the merged tensors.
        norm_scale: n = β · task_norm / safety_norm.
        retained_share: Expected, over all merged tensors.
        masks: Which elements take part. Absent: all, the method as published.
        unused: Tensors of base model or vector that the task model does not have, with the reason.
        tensors: Every tensor of the task model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: FormatVersion = 1
    task_model: ModelReference
    base_model: ModelReference
    safety_vector: VectorReference
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    rank_fraction: Annotated[float, Field(gt=0, le=1)]
    scope: Scope
    task_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    safety_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    norm_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    retained_share: Share
    masks: MaskReference | None = None
    unused: dict[str, str] = {}
    tensors: dict[str, PlannedTensor]

    @model_validator(mode="after")
    def _masks_are_complete(self) -> Self:
        for name, tensor in self.tensors.items():
            wanted = self.masks is not None and tensor.action == "merge"
            if (tensor.keep_digest is not None) != wanted:
                raise ValueError(
                    f"'{name}': a plan with masks has a keep_digest for each merged tensor, "
                    "and others have none"
                )
        return self

    @property
    def merged(self) -> dict[str, PlannedTensor]:
        """The tensors that are merged."""
        return {name: t for name, t in self.tensors.items() if t.action == "merge"}

    def to_json(self) -> str:
        """The file's text: the same bytes for the same plan; a line for each tensor."""
        head = self.model_dump(mode="json", exclude={"tensors"}, exclude_none=True)
        lines = [
            f"    {json.dumps(name)}: "
            + json.dumps(t.model_dump(mode="json", exclude_none=True, exclude_defaults=True))
            for name, t in sorted(self.tensors.items())
        ]
        text = json.dumps(head, indent=2).removesuffix("\n}")
        return text + ',\n  "tensors": {\n' + ",\n".join(lines) + "\n  }\n}\n"
