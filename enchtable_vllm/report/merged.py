"""What ``enchtable merge --json`` said of an offline merge, read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from enchtable_vllm.checkpoint.files import read_json
from enchtable_vllm.errors import MergePlanError, MismatchError
from enchtable_vllm.plan import ResolvedPlan
from enchtable_vllm.vector import Scope
from enchtable_vllm.vector.safety_vector import describe_fault

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class Merged(BaseModel):
    """The document, as far as the page shows it.

    Attributes:
        merged, kept, filtered: Tensors.
        retained_share, cosine, relative_error: Measured, over everything that was merged.
        merged_digest: Of every merged byte.
        plan_digest, beta, scope: What was in force.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    merged: Count
    kept: Count
    filtered: Count
    retained_share: Number
    cosine: Number
    relative_error: Number
    rounding: str
    merged_digest: str | None = None
    merged_bytes: Count = 0
    plan_digest: str
    beta: Number
    scope: Scope
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Merged:
        """A file of it.

        Raises:
            MergePlanError: It cannot be read, or is something else.
        """
        try:
            return cls.model_validate_json(read_json(path)[1])
        except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
            raise MergePlanError(
                f"merge report '{path}'",
                expected="what 'enchtable merge --json' prints",
                got=describe_fault(error) if isinstance(error, ValueError) else error,
                fix="Keep its standard output in a file: enchtable merge ... --json > FILE",
            ) from error

    def check(self, resolved: ResolvedPlan) -> None:
        """Refuse the report of another merge.

        Raises:
            MismatchError: Plan, β or scope differ.
        """
        mine = f"plan {resolved.digest}, beta {resolved.beta:g}, scope {resolved.scope}"
        alike = math.isclose(self.beta, resolved.beta)
        if (self.plan_digest, self.scope) != (resolved.digest, resolved.scope) or not alike:
            raise MismatchError(
                "merge plan and merge report",
                expected=f"a merge by this plan as it is in force: {mine}",
                got=f"plan {self.plan_digest}, beta {self.beta:g}, scope {self.scope}",
                fix="Give that merge's plan, and its --beta and --scope.",
            )
