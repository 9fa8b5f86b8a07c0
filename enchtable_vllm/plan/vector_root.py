"""The folder that a server takes its safety vectors from.

``ROOT/NAME/`` holds a vector, ``ROOT/NAME/plans/TASK_FINGERPRINT.json`` its plans, and
``ROOT/current.json`` names the vector that a server loads when it starts with ``@current``: what
a roll-out updates, so that restarted and scaled-out servers agree.
"""

from __future__ import annotations

import json
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from enchtable_vllm.checkpoint import FileTransaction
from enchtable_vllm.errors import (
    ConfigError,
    MergePlanError,
    NoPlanError,
    UnknownVectorError,
)
from enchtable_vllm.files import is_there, read_json, refuse_link_out
from enchtable_vllm.vector.format import FormatVersion
from enchtable_vllm.vector.safety_vector import describe_fault

#: Asks for what ``current.json`` names.
CURRENT = "@current"
#: Asks for no vector at all. No folder can have this name.
NO_VECTOR = "@none"

CURRENT_FILE = "current.json"
PLANS_FOLDER = "plans"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PINNED = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*@[0-9a-f]{40}", re.ASCII)

Beta = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def is_vector_name(text: str) -> bool:
    """Whether a folder of a vector root may have this name."""
    return _NAME.fullmatch(text) is not None


def _refuse_reference(name: str) -> str:
    if name == CURRENT:
        raise ValueError(f"the name of a vector, not '{CURRENT}'")
    return name


def is_pinned_repository(text: str) -> bool:
    """Whether this is ``org/name@COMMIT``, the commit in full."""
    return _PINNED.fullmatch(text) is not None


class CurrentVector(BaseModel):
    """``current.json``: what the servers of this root are to serve.

    Attributes:
        format_version: Of this file.
        version: Counts the changes.
        safety_vector: A name of the root, an allowed repository, or ``@none``.
        beta: Another β than the plan's.
        updated: When, in UTC.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: FormatVersion = 1
    version: Annotated[int, Field(ge=1)]
    safety_vector: Annotated[str, Field(min_length=1), AfterValidator(_refuse_reference)]
    beta: Beta | None = None
    updated: str


class VectorRoot:
    """Finds vectors and plans by name, inside one folder and nowhere else.

    Args:
        path: The folder.

    Raises:
        ConfigError: It is not a folder that can be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        try:
            self._home = self.path.resolve(strict=True)
            self.names()
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"vector root '{self.path}'",
                expected="a folder that can be read",
                got=error,
                fix="Check 'vector_root' and its permissions; 'enchtable doctor --vector-root' "
                "looks closer.",
            ) from error

    def names(self) -> list[str]:
        """The folders that could be vectors, in order."""
        return sorted(p.name for p in self._home.iterdir() if is_vector_name(p.name) and p.is_dir())

    def folder(self, name: str) -> Path:
        """The folder of a vector.

        Raises:
            UnknownVectorError: The root has none of this name, or it is a link out of it.
        """
        folder = self._home / name
        known = is_vector_name(name) and folder.is_dir()
        if known and folder.resolve().is_relative_to(self._home):
            return folder
        got = f"'{name}'" + (", a link out of it" if known else "")
        raise UnknownVectorError(
            f"vector root '{self.path}'",
            expected=f"one of {self.names()}",
            got=got,
            fix="Put the vector's folder into the root itself, or name one that is there.",
        )

    def plan(self, name: str, task_fingerprint: str) -> Path | None:
        """The plan of a vector for a task model, if there is one.

        Raises:
            UnknownVectorError: As `folder`.
            MergePlanError: It is a link out of the vector's folder.
        """
        folder = self.folder(name)
        path = plan_path(folder, task_fingerprint)
        if not is_there(path):
            return None
        try:
            refuse_link_out(path, folder.resolve())
        except ValueError as error:
            raise MergePlanError(
                f"vector '{name}', merge plan",
                expected="a file inside the vector's own folder",
                got=error,
                fix="Put the file itself there.",
            ) from error
        return path

    def current(self) -> CurrentVector | None:
        """What ``current.json`` says; None where there is none.

        Raises:
            ConfigError: It cannot be read, or is not what it should be.
        """
        path = self._home / CURRENT_FILE
        if not is_there(path):
            return None
        try:
            refuse_link_out(path, self._home)
            return CurrentVector.model_validate_json(read_json(path)[1])
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"'{self.path / CURRENT_FILE}'",
                expected="format version 1",
                got=describe_fault(error),
                fix="Write it anew with a swap that persists: 'enchtable swap --persist'.",
            ) from error

    def set_current(self, safety_vector: str, beta: float | None) -> CurrentVector:
        """Write ``current.json``, whole or not at all; nothing changes where it says so already.

        Raises:
            ConfigError: It cannot be written.
        """
        try:
            before = self.current()
        except ConfigError:  # damaged: this is how it is written anew
            before = None
        if before and (before.safety_vector, before.beta) == (safety_vector, beta):
            return before
        current = CurrentVector(
            version=before.version + 1 if before else 1,
            safety_vector=safety_vector,
            beta=beta,
            updated=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        text = json.dumps(current.model_dump(), indent=2) + "\n"
        with FileTransaction(self._home / CURRENT_FILE) as partial:
            partial.write_text(text, encoding="utf-8")
        return current

    def refuse_read_only(self) -> None:
        """Refuse a root in which ``current.json`` cannot be written.

        Raises:
            ConfigError: It cannot.
        """
        try:
            with tempfile.TemporaryFile(dir=self._home):
                pass
        except OSError as error:
            raise ConfigError(
                f"vector root '{self.path}'",
                expected="a folder that this server may write to, to persist a swap",
                got=error,
                fix="Give it write permission, or swap without 'persist' and write "
                f"'{CURRENT_FILE}' yourself.",
            ) from error

    def clear_current(self) -> None:
        """Remove ``current.json``: the state before its first version."""
        (self._home / CURRENT_FILE).unlink(missing_ok=True)


def plan_path(folder: Path, task_fingerprint: str) -> Path:
    """Where a vector's folder keeps its plan for a task model."""
    return folder / PLANS_FOLDER / f"{task_fingerprint.removeprefix('blake3:')}.json"


def no_plan(name: str, folder: Path, task_model: str, task_fingerprint: str) -> NoPlanError:
    """The refusal that names the command to run."""
    return NoPlanError(
        f"safety vector '{name}'",
        expected=f"a plan for task model '{task_model}' {task_fingerprint}, or 'base_model' in "
        "--model-loader-extra-config to make one from",
        got="neither",
        fix=f"enchtable plan --task-model {task_model} --base-model BASE "
        f"--safety-vector {folder} -o {plan_path(folder, task_fingerprint)}",
    )
