"""Every error this package raises on purpose, as one tree.

A message always has the same form, so that it can be acted on at three in the morning:
*what, where: expected X, got Y. Do Z.*
"""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN_FAULTS = 5
_SHOWN_CHARACTERS = 2000


def printable(text: object) -> str:
    """One line, of bounded length, without control characters.

    Names in a message come from files, and files from anywhere: they must neither forge a line
    of a log nor steer a terminal.
    """
    shown = str(text)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = f"{shown[:_SHOWN_CHARACTERS]}... ({len(shown)} characters)"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


class EnchTableError(Exception):
    """Base of all errors raised on purpose.

    Args:
        subject: What is at fault and where: ``safety vector 'sv', tensor 'x.weight'``.
        expected: What was required.
        got: What was found.
        fix: What to do about it: one or more sentences.
    """

    def __init__(self, subject: str, *, expected: object, got: object, fix: str) -> None:
        self.subject = subject
        self.expected = expected
        self.got = got
        self.fix = fix
        parts = map(printable, (subject, expected, got, fix))
        super().__init__("{}: expected {}, got {}. {}".format(*parts))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross processes.
        return _rebuild, (type(self), self.subject, self.expected, self.got, self.fix)


def _rebuild(
    kind: type[EnchTableError], subject: str, expected: object, got: object, fix: str
) -> EnchTableError:
    return kind(subject, expected=expected, got=got, fix=fix)


class ConfigError(EnchTableError):
    """An option, a configuration key or an environment variable is not usable."""


class CheckpointError(EnchTableError):
    """A checkpoint is missing, truncated, corrupt or of a kind that is not supported."""


class QuantizedCheckpointError(CheckpointError):
    """The checkpoint is quantised already: adding to its packed numbers would be nonsense."""


class SafetyVectorError(EnchTableError):
    """A safety vector is malformed, corrupt, or not what its manifest says."""


class SignatureError(EnchTableError):
    """A vector is not signed, not by whom it must be, or was changed since."""


class MergePlanError(EnchTableError):
    """A merge plan is malformed or contradicts itself."""


class NoPlanError(MergePlanError):
    """There is no plan for this task model, and nothing to make one from."""


class UnknownVectorError(EnchTableError):
    """A server may not take a vector of this name, or there is none."""


class NotSwappableError(EnchTableError):
    """This model's weights cannot be exchanged while it is served."""


class MemoryBoundError(EnchTableError):
    """What would have to be held in host memory is more than may be used."""


class MismatchError(EnchTableError):
    """Two artefacts that must belong together do not."""


class NonFiniteError(EnchTableError):
    """A tensor holds, or a merge produced, NaN or infinity."""


class TrainingDataError(EnchTableError):
    """Rows of training data cannot be used.

    Attributes:
        faults: Every one of them, with its line; the message holds the first few.
    """

    faults: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        return (*super().__reduce__(), {"faults": self.faults})


class IncompleteMergeError(EnchTableError):
    """A merge ended without having merged what the plan says."""


def summarize_faults(faults: Sequence[str]) -> str:
    """Join faults into one phrase: the first five, then how many more there are."""
    shown = "; ".join(faults[:_SHOWN_FAULTS])
    more = len(faults) - _SHOWN_FAULTS
    return f"{len(faults)} fault(s): {shown}" + (f"; and {more} more" if more > 0 else "")
