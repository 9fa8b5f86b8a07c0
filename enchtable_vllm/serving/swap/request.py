"""What a client may ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from enchtable_vllm.plan.vector_root import Beta
from enchtable_vllm.serving.swap.errors import SwapError
from enchtable_vllm.vector.safety_vector import describe_fault

PauseMode = Literal["keep", "wait", "abort"]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """A request's body.

        Raises:
            SwapError: It is no JSON object with these keys, types and ranges.
        """
        try:
            return cls.model_validate_json(body or b"{}")
        except ValidationError as error:
            raise SwapError(
                "invalid_request",
                f"request body: expected an object with keys among {sorted(cls.model_fields)}, "
                f"got {describe_fault(error)}",
                "See docs/http-api.md, or /docs on this server.",
            ) from error


class RollbackRequest(_Request):
    """Go back to what was served before the last swap.

    Attributes:
        pause: What becomes of running requests: ``keep`` (they go on afterwards), ``wait`` (for
            them), ``abort``.
        expected_epoch: Refuse unless the server is at this epoch. Default: whatever it is at.
        timeout_seconds: For staging.
    """

    pause: PauseMode = "keep"
    expected_epoch: Annotated[int, Field(ge=0)] | None = None
    timeout_seconds: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = 600.0


class SwapRequest(RollbackRequest):
    """Exchange the safety vector.

    Attributes:
        safety_vector: A name of the vector root, an allowed repository at its commit,
            ``@current``, or ``@none``.
        beta: Another β than the plan's; positive and finite.
        dry_run: Stage and check on every rank, then drop it: nothing is paused or changed.
        persist: Also write the root's ``current.json``, so that restarted servers agree.
    """

    safety_vector: Annotated[str, Field(min_length=1, max_length=300)]
    beta: Beta | None = None
    dry_run: bool = False
    persist: bool = False


def schema(kind: type[_Request]) -> dict[str, Any]:
    """For the OpenAPI page."""
    return {
        "requestBody": {
            "required": kind is SwapRequest,
            "content": {"application/json": {"schema": kind.model_json_schema()}},
        }
    }
