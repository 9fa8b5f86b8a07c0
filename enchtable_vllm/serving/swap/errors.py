"""Why a swap did not happen: a code that programs can rely on, and words for people."""

from __future__ import annotations

from typing import Any

#: Code → HTTP status. The whole list: docs/http-api.md.
STATUS = {
    "admin_token_missing": 401,
    "admin_token_wrong": 403,
    "unknown_vector": 404,
    "swap_in_progress": 409,
    "wrong_epoch": 409,
    "nothing_to_roll_back": 409,
    "paused_by_another": 409,
    "invalid_request": 422,
    "no_plan": 422,
    "not_swappable": 422,
    "refused": 422,
    "undone": 500,
    "failed": 503,
    "not_ready": 503,
    "timeout": 504,
    "does_not_fit": 507,
}


class SwapError(Exception):
    """A swap, or a question about one, that was not answered as asked.

    Args:
        code: One of `STATUS`.
        message: What is wrong.
        fix: What to do about it.
        kind: The class of the error behind it, if there is one.
    """

    def __init__(self, code: str, message: str, fix: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.code = code if code in STATUS else "refused"
        self.message = message
        self.fix = fix
        self.kind = kind

    @classmethod
    def of(cls, answer: dict[str, Any]) -> SwapError:
        """From what a rank answered."""
        error = answer["error"]
        return cls(answer["code"], error["message"], error["fix"], error["kind"])

    @property
    def status(self) -> int:
        """Of the HTTP response."""
        return STATUS[self.code]

    def to_json(self) -> dict[str, Any]:
        """The body of the HTTP response."""
        error = {"code": self.code, "message": self.message, "fix": self.fix}
        return {"error": error | ({"kind": self.kind} if self.kind else {})}
