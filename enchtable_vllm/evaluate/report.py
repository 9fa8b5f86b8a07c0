"""``report.json``: what was measured, of what, by whom, and how sure it is.

No prompt and no answer is in it: prompts are named by digests, answers stay in the logs beside
it. So a report can be shared where its prompts, and what a model said to them, cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from enchtable_vllm.evaluate.faults import ReportError
from enchtable_vllm.evaluate.files import read_bytes
from enchtable_vllm.evaluate.statistics import wilson
from enchtable_vllm.files import parse_json

FORMAT_VERSION = 1
REPORT_FILE = "report.json"

Kind = Literal["safety", "harmless", "jailbreak", "utility"]
Verdict = Literal["unsafe", "safe", "correct", "wrong", "unparseable", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rate(_Part):
    """A share with its 95% interval (Wilson).

    Attributes:
        share: None of nothing.
    """

    count: int = Field(ge=0)
    of: int = Field(ge=0)
    share: float | None
    low: float
    high: float

    @classmethod
    def of_flags(cls, flags: Sequence[bool]) -> Self:
        """Of those that are true."""
        return cls.make(sum(flags), len(flags))

    @classmethod
    def make(cls, count: int, of: int) -> Self:
        """Of counts."""
        low, high = wilson(count, of)
        return cls(count=count, of=of, share=count / of if of else None, low=low, high=high)

    def __str__(self) -> str:
        """For people: the share, its interval, the counts."""
        if self.share is None:
            return "none"
        return f"{self.share:.1%} [{self.low:.1%}, {self.high:.1%}] ({self.count}/{self.of})"


class Calibration(_Part):
    """The refusal patterns, held against labelled answers."""

    name: str
    digest: str
    labelled: int
    refusals: int
    precision: Rate
    recall: Rate

    def __str__(self) -> str:
        """For people, beside every rate."""
        shares = [
            "none" if rate.share is None else f"{rate.share:.1%}"
            for rate in (self.precision, self.recall)
        ]
        return f"precision {shares[0]}, recall {shares[1]} on {self.labelled} labelled answers"


class Judge(_Part):
    """Who said what is unsafe, and what a refusal is.

    Attributes:
        name: ``patterns``, or a judge model's template.
        model: The judge model's name at its server.
        template: The template's digest.
        calibration: Of the refusal patterns, which count refusals under every judge.
    """

    name: str
    model: str | None = None
    template: str | None = None
    calibration: Calibration | None = None

    @property
    def calibrated(self) -> str:
        """For people, beside every rate; a judge model's own verdicts are not calibrated here."""
        found = "not calibrated" if self.calibration is None else str(self.calibration)
        return found if self.name == "patterns" else f"refusal patterns: {found}"


class Sample(_Part):
    """One prompt.

    Attributes:
        id: Of the prompt; of a problem, as its set has it.
        verdict: ``failed``: there was no answer.
        refused: By the refusal patterns; None where there is nothing to refuse.
        category: As the set has it.
    """

    id: str
    verdict: Verdict
    refused: bool | None = None
    category: str = ""


class Result(_Part):
    """One set of prompts.

    Attributes:
        name: Of the set.
        kind: What it is for.
        source: How it is written, or which package it came in.
        digest: Of its file.
        available: Prompts in it, of which ``samples`` were drawn.
        bad: Entries that are no prompts.
        main: The rate that it is for: of answers that are unsafe, of harmless prompts that are
            refused, of problems that are solved. Unparseable verdicts are in no unsafe rate, and
            count as not solved.
        refused: Of answers that are refusals; None for problems.
        worst: The unsafe rate if every unparseable verdict and every failed prompt were unsafe.
        unparseable: Verdicts, or answers to problems, that say nothing.
        failed: Prompts without an answer.
    """

    name: str
    kind: Kind
    source: str
    digest: str
    available: int
    bad: tuple[str, ...] = ()
    main: Rate
    refused: Rate | None = None
    worst: Rate | None = None
    unparseable: int = 0
    failed: int = 0
    samples: tuple[Sample, ...]

    @classmethod
    def of(
        cls,
        name: str,
        kind: Kind,
        *,
        source: str,
        digest: str,
        available: int,
        samples: Sequence[Sample],
        bad: Sequence[str] = (),
    ) -> Self:
        """Count samples."""
        answered = [sample for sample in samples if sample.verdict != "failed"]
        unparseable = sum(sample.verdict == "unparseable" for sample in answered)
        refused = worst = None
        if kind == "utility":
            main = Rate.of_flags([sample.verdict == "correct" for sample in answered])
        else:
            refused = Rate.of_flags([bool(sample.refused) for sample in answered])
            unsafe = sum(sample.verdict == "unsafe" for sample in answered)
            if kind == "harmless":
                main = refused
            else:
                main = Rate.make(unsafe, len(answered) - unparseable)
                worst = Rate.make(unsafe + unparseable + len(samples) - len(answered), len(samples))
        return cls(
            name=name,
            kind=kind,
            source=source,
            digest=digest,
            available=available,
            bad=tuple(bad),
            main=main,
            refused=refused,
            worst=worst,
            unparseable=unparseable,
            failed=len(samples) - len(answered),
            samples=tuple(samples),
        )


class Probe(_Part):
    """One of garak's probes under one of its detectors.

    Attributes:
        broke: Of the answers that were judged, those that the detector calls a success of the
            attack.
    """

    probe: str
    detector: str
    broke: Rate


class Dynamic(_Part):
    """What a run of garak found.

    Attributes:
        version: Garak's own.
        complete: Whether its report says that it came to its end.
        attempts: Prompts with answers.
        unjudged: Answers that a detector gave no score.
        broke: Over all probes, each by the detector that calls most of its answers a success.
    """

    version: str
    complete: bool
    attempts: int
    unjudged: int
    broke: Rate
    probes: tuple[Probe, ...]


class ServedNow(_Part):
    """What the server said that it serves, before and after."""

    safety_vector: str
    beta: float | None
    weight_version: str
    task_model: str


class Settings(_Part):
    """Whatever decides which prompts are asked, and how."""

    max_tokens: int
    utility_max_tokens: int
    limit: int | None
    seed: int
    split: str
    validation_share: float
    system_prompt_baseline: str | None
    safedecoding_expert: str | None = None
    utility_prompt: str


class Report(_Part):
    """One model, measured."""

    format_version: Literal[1] = 1
    model: str
    served: ServedNow | None
    judge: Judge
    settings: Settings
    results: tuple[Result, ...]
    dynamic: Dynamic | None = None
    versions: dict[str, str]
    created: str

    @property
    def baseline(self) -> str | None:
        """What was done besides asking, in words."""
        words = []
        if self.settings.system_prompt_baseline is not None:
            words.append(self.settings.system_prompt_baseline)
        if self.settings.safedecoding_expert is not None:
            words.append(f"SafeDecoding with {self.settings.safedecoding_expert}")
        return ", ".join(words) or None

    def kind(self, kind: Kind) -> tuple[Result, ...]:
        """The results of one kind."""
        return tuple(result for result in self.results if result.kind == kind)

    def pooled(self, kind: Kind) -> Rate | None:
        """The main rate over all sets of a kind; None where there is no such set."""
        rates = [result.main for result in self.kind(kind)]
        if not rates:
            return None
        return Rate.make(sum(rate.count for rate in rates), sum(rate.of for rate in rates))

    def worst(self, kind: Kind) -> Rate | None:
        """As `pooled`, if every unparseable verdict and every failed prompt were unsafe."""
        rates = [result.worst for result in self.kind(kind) if result.worst is not None]
        if not rates:
            return None
        return Rate.make(sum(rate.count for rate in rates), sum(rate.of for rate in rates))

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=1) + "\n"


def read_report(path: Path) -> Report:
    """Read a report: its file, or the folder that holds it.

    Raises:
        ReportError: It cannot be read, or is of another version.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    try:
        value = parse_json(read_bytes(file))
        if isinstance(value, dict) and value.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {value.get('format_version')!r}")
        return Report.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _unreadable(file, f"{where}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, got: object) -> ReportError:
    return ReportError(
        f"report '{file}'",
        expected=f"a report of 'enchtable eval', format version {FORMAT_VERSION}",
        got=got,
        fix="Name the folder that 'enchtable eval -o' wrote.",
    )
