"""``--model-loader-extra-config``: typed, complete, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.merge.report import Rounding
from enchtable_vllm.plan.vector_root import CURRENT, NO_VECTOR, Beta, is_pinned_repository
from enchtable_vllm.signing import Requirement
from enchtable_vllm.vector import Scope
from enchtable_vllm.vector.safety_vector import describe_fault

Reference = Annotated[str, Field(min_length=1)]


class LoaderConfig(BaseModel):
    """The loader's keys. All are optional: a model folder may carry its plan and vector.

    Attributes:
        safety_vector: Folder, or Hub id with ``@revision``. Default: where the plan says. With a
            ``vector_root`` also the name of a folder in it, or ``@current``, which its
            ``current.json`` names. ``@none``: no vector; what is served is the task model.
        merge_plan: A plan file, or a folder or Hub id that holds ``merge_plan.json``. Default:
            the model's own.
        base_model: Folder or Hub id; then the plan is computed at load, once for all ranks of a
            machine, and cached.
        beta: Another β than the plan's; finite.
        scope: A part of the plan's scope; the result is what planning with it gives.
        verify: How the task model is checked: ``sampled`` fingerprints, or every byte
            (``content``), which also logs a digest of the merged weights. The vector is
            always checked to the last byte.
        rounding: How sums are rounded to bf16: ``nearest``, or ``stochastic`` (experimental: it
            keeps in the mean what rounding to nearest loses, and adds noise).
        inner_load_format: vLLM's load format for the stored weights.
        inner_extra_config: That format's own extra config.
        vector_root: Folder that holds a folder for each vector that may be swapped in.
        allowed_repositories: Hub repositories that may be swapped in, ``org/name@COMMIT`` each.
        staging_gib: The most host memory that a swap may take on this machine, all ranks
            together. Default: half of what is free.
        require_signature: Who must have signed a vector and its plan: nothing else is loaded or
            swapped in, no vector at all neither. See docs/signing.md.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    safety_vector: Reference | None = None
    merge_plan: Reference | None = None
    base_model: Reference | None = None
    beta: Beta | None = None
    scope: Scope | None = None
    verify: Literal["sampled", "content"] = "sampled"
    rounding: Rounding = "nearest"
    inner_load_format: Reference = "auto"
    inner_extra_config: dict[str, Any] = {}
    vector_root: Reference | None = None
    allowed_repositories: list[Reference] = []
    staging_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    require_signature: Requirement | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.base_model and self.merge_plan:
            raise ValueError("give 'merge_plan' or 'base_model' (to compute a plan), not both")
        if self.base_model and not self.safety_vector:
            raise ValueError("'base_model' needs 'safety_vector'")
        if self.inner_load_format.lower() == "enchtable":
            raise ValueError("'inner_load_format' is the format of the stored weights")
        if self.safety_vector == CURRENT and self.vector_root is None:
            raise ValueError(f"'safety_vector': '{CURRENT}' needs 'vector_root'")
        if self.safety_vector == CURRENT and (self.beta is not None or self.merge_plan is not None):
            raise ValueError(f"with '{CURRENT}' beta and plan are those that the root names")
        if unpinned := [r for r in self.allowed_repositories if not is_pinned_repository(r)]:
            raise ValueError(f"'allowed_repositories': {unpinned[0]!r} is not 'org/name@COMMIT'")
        if self.require_signature and self.base_model:
            raise ValueError("'require_signature' excludes 'base_model': a plan is signed ahead")
        if self.require_signature and self.safety_vector == NO_VECTOR:
            raise ValueError(f"'require_signature' excludes '{NO_VECTOR}', which nobody signed")
        return self

    @classmethod
    def parse(cls, extra: object) -> LoaderConfig:
        """Validate what vLLM hands over.

        Raises:
            ConfigError: Unknown keys, wrong types or values, keys that exclude each other.
        """
        try:
            return cls.model_validate(extra)
        except ValidationError as error:
            raise ConfigError(
                "--model-loader-extra-config",
                expected=f"an object with keys among {sorted(cls.model_fields)}",
                got=describe_fault(error),
                fix="See docs/configuration.md.",
            ) from error
