"""What ``enchtable plan --json`` and ``enchtable merge --json`` said, read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

from enchtable_vllm.errors import MergePlanError, MismatchError
from enchtable_vllm.files import read_json
from enchtable_vllm.plan import ResolvedPlan
from enchtable_vllm.vector import Scope
from enchtable_vllm.vector.safety_vector import describe_fault

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _Printed(BaseModel):
    """A command's ``--json``, as far as the page shows it."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    command: ClassVar[str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """A file of it.

        Raises:
            MergePlanError: It cannot be read, or is something else.
        """
        try:
            return cls.model_validate_json(read_json(path)[1])
        except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
            raise MergePlanError(
                f"{cls.command} report '{path}'",
                expected=f"what 'enchtable {cls.command} --json' prints",
                got=describe_fault(error) if isinstance(error, ValueError) else error,
                fix="Keep its standard output in a file: "
                f"enchtable {cls.command} ... --json > FILE",
            ) from error


class Planned(_Printed):
    """Of planning: what the plan itself does not hold, because it is the same bytes everywhere.

    Attributes:
        plan_digest: Of the plan that was made.
        seconds: Tensor → how long its linear algebra took, where it was done.
    """

    command = "plan"
    plan_digest: str
    seconds: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]

    def check(self, resolved: ResolvedPlan) -> None:
        """Refuse what was printed of another plan.

        Raises:
            MismatchError: It was.
        """
        if self.plan_digest != resolved.digest:
            raise MismatchError(
                "merge plan and plan report",
                expected=f"what was printed when this plan was made, {resolved.digest}",
                got=f"plan {self.plan_digest}",
                fix="Give that plan, or leave the report of planning out.",
            )


class Merged(_Printed):
    """Of an offline merge.

    Attributes:
        merged, kept, filtered: Tensors.
        retained_share, cosine, relative_error: Measured, over everything that was merged.
        merged_digest: Of every merged byte.
        plan_digest, beta, scope: What was in force.
    """

    command = "merge"
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
