"""``--model-loader-extra-config``: typed, complete, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.merge.report import Rounding
from enchtable_vllm.vector import Scope
from enchtable_vllm.vector.safety_vector import describe_fault

Reference = Annotated[str, Field(min_length=1)]


class LoaderConfig(BaseModel):
    """The loader's keys. All are optional: a model folder may carry its plan and vector.

    Attributes:
        safety_vector: Folder, or Hub id with ``@revision``. Default: where the plan says.
        merge_plan: A plan file, or a folder or Hub id that holds ``merge_plan.json``. Default:
            the model's own.
        base_model: Folder or Hub id; then the plan is computed at load and cached.
        beta: Another β than the plan's.
        scope: A part of the plan's scope.
        verify: How the task model is checked: ``sampled`` fingerprints, or every byte
            (``content``), which also logs a digest of the merged weights. The vector is
            always checked to the last byte.
        rounding: How sums are rounded to bf16: ``nearest``, or ``stochastic`` (experimental: it
            keeps in the mean what rounding to nearest loses, and adds noise).
        inner_load_format: vLLM's load format for the stored weights.
        inner_extra_config: The extra config of that format.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    safety_vector: Reference | None = None
    merge_plan: Reference | None = None
    base_model: Reference | None = None
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    scope: Scope | None = None
    verify: Literal["sampled", "content"] = "sampled"
    rounding: Rounding = "nearest"
    inner_load_format: Reference = "auto"
    inner_extra_config: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.base_model and self.merge_plan:
            raise ValueError("give 'merge_plan' or 'base_model' (to compute a plan), not both")
        if self.base_model and not self.safety_vector:
            raise ValueError("'base_model' needs 'safety_vector'")
        if self.inner_load_format.lower() == "enchtable":
            raise ValueError("'inner_load_format' is the format of the stored weights")
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
                fix="See 'Serve' in the README.",
            ) from error
