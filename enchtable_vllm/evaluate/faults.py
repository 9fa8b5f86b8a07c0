"""What can be wrong with an evaluation, besides its options."""

from __future__ import annotations

from enchtable_vllm.errors import EnchTableError


class PromptSetError(EnchTableError):
    """A file of prompts, problems, labels or templates is not what it should be."""


class EvaluationError(EnchTableError):
    """An evaluation did not come to its end; what it has found so far is kept."""


class ReportError(EnchTableError):
    """A report is malformed, or two do not belong together."""
