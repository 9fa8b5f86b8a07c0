"""What a benchmark can be told: checked before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from enchtable_vllm.errors import ConfigError

#: A check that it works, in seconds; what is published; what takes longer and covers more.
Size = Literal["quick", "default", "full"]


class Options(BaseModel):
    """The options of a benchmark: its own class has them as fields, each with its default.

    Attributes:
        scratch: A folder that ``verify`` and ``measure`` share; the harness makes and removes it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    scratch: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``a,b`` is a tuple, where a tuple is wanted."""
        kinds = {name: get_origin(field.annotation) for name, field in cls.model_fields.items()}
        return {
            name: tuple(filter(None, value.split(",")))
            if isinstance(value, str) and kinds.get(name) is tuple
            else value
            for name, value in values.items()
        }


def parse(
    kind: type[Options], preset: Mapping[str, object], assignments: Sequence[str], scratch: Path
) -> Options:
    """A benchmark's options: its defaults, those of a size over them, the user's over both.

    Args:
        kind: The benchmark's class of options.
        preset: What the size sets.
        assignments: ``name=value``.
        scratch: See `Options`.

    Raises:
        ConfigError: No such option, or no such value.
    """
    chosen = dict(preset)
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        chosen[name] = value
    try:
        return kind(**{**chosen, "scratch": scratch})
    except ValidationError as error:
        (first, *_) = error.errors()
        raise ConfigError(
            f"option '{'.'.join(map(str, first['loc']))}'",
            expected=first["msg"],
            got=first["input"],
            fix="'python -m benchmarks list NAME' lists a benchmark's options.",
        ) from None
