"""Why a swap did not happen: a code that programs can rely on, and words for people."""

from __future__ import annotations

from typing import Any, NamedTuple


class Code(NamedTuple):
    """What a code stands for.

    Attributes:
        status: Of the HTTP response.
        meaning: For people; docs/http-api.md has the list.
    """

    status: int
    meaning: str


CODES = {
    "admin_token_missing": Code(401, "the header is not there"),
    "admin_token_wrong": Code(403, "it is not the token"),
    "unknown_vector": Code(404, "the root has no such vector, or the repository is not allowed"),
    "swap_in_progress": Code(409, "another swap holds the lock; nothing was done"),
    "wrong_epoch": Code(409, "the server is not at `expected_epoch`"),
    "nothing_to_roll_back": Code(
        409, "nothing was swapped since the start, or all of it was rolled back"
    ),
    "paused_by_another": Code(409, "generation was paused already, and not by a swap"),
    "lost_lock": Code(409, "silent for so long that another swap took its lock; nothing was done"),
    "invalid_request": Code(422, "a key, a type or a range"),
    "no_plan": Code(422, "no plan for this task model; `fix` is the command"),
    "not_swappable": Code(422, "this server's model cannot be swapped; the reason says why"),
    "refused": Code(
        422,
        "vector, plan and task model do not fit, or their bytes are wrong; `kind` is the error's "
        "class",
    ),
    "undone": Code(
        500,
        "a rank failed while committing; every rank is back on the old vector, and generation "
        "goes on",
    ),
    "failed": Code(503, "and that did not succeed: generation stays paused, readiness is 503"),
    "not_ready": Code(503, "the engine does not answer"),
    "timeout": Code(504, "staging took too long; nothing was changed"),
    "does_not_fit": Code(
        507, "old and new tensors would not fit into the host memory that may be used"
    ),
}


class SwapError(Exception):
    """A swap, or a question about one, that was not answered as asked.

    Args:
        code: One of `CODES`.
        message: What is wrong.
        fix: What to do about it.
        kind: The class of the error behind it, if there is one.
    """

    def __init__(self, code: str, message: str, fix: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.code = code if code in CODES else "refused"
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
        return CODES[self.code].status

    def to_json(self) -> dict[str, Any]:
        """The body of the HTTP response."""
        error = {"code": self.code, "message": self.message, "fix": self.fix}
        return {"error": error | ({"kind": self.kind} if self.kind else {})}
