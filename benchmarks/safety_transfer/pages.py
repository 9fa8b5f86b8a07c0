"""The tables of README.md and docs/transfer.md: what the newest run found."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.results import NotMeasured, Results
from benchmarks.harness.tables import Table

from .measuring import MOST_COST

#: A report's folder → what it is called; ``{}`` is its β. In the order of the table.
MODELS = {
    "aligned": "aligned",
    "task": "fine-tune",
    "merged-published": "merged, β {}, as published",
    "merged": "merged, β {}",
    "merged-tenth": "merged, β {}, the smallest that reached a tenth of the unsafe rate "
    "on the validation split",
    "self-reminder": "fine-tune with Self-Reminder",
    "safedecoding": "fine-tune with SafeDecoding",
}
METRICS = {"unsafe": "unsafe", "utility": "word problems", "over_refusal": "over-refusal"}
_OF_A_MERGE = {"retained_share": "retained share", "median_attenuation": "median attenuation"}
#: A vector that differs from the main one → in what.
ABLATED = {
    "merged": "the vector as it is, tuned among more β",
    "stochastic": "rounded stochastically",
    "stochastic-published": "rounded stochastically, at the β published",
    "unattenuated": "without attenuation",
    "fewer-anchors": "surrogate: one harmless answer for each opening, not four",
    "unanchored": "surrogate: openings alone, no harmless answers",
    "contrasted": "surrogate: learns to refuse the harmless requests",
    "ffn": "scope: feed-forward",
    "attention-ffn": "scope: attention and feed-forward",
    "attention-ffn-0.5": "— with half the β for feed-forward",
    "attention-ffn-2": "— with twice the β for feed-forward",
    "ffn-linear": "scope: feed-forward, linearised by module",
    "quarter-data": "a quarter of the pairs",
    "half-steps": "half the steps",
    "double-steps": "twice the steps",
    "published-rate": "the learning rate and epochs published",
}
_PUBLIC = {"public-task": "fine-tune", "public-merged": "merged"}
_PUBLIC_SETS = {"humaneval": "HumanEval", "gsm8k": "GSM8K", "medmcqa": "MedMCQA"}


@dataclass(frozen=True)
class Found:
    """One figure of one seed; in the words of `findings`.

    Attributes:
        beta: None without a merge.
        value, low, high: Shares, and a 95% interval; or a p-value, without one.
        n: Of so many.
        device, utc, git_sha, command: What made it.
    """

    model: str
    seed: int
    set: str
    beta: float | None
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    device: str
    utc: str
    git_sha: str
    command: str


def newest(path: Path, split: str = "test") -> list[Found]:
    """The newest figures by the newest run's recipe, on one side of the split.

    Of each seed and model its last run's: seeds may come from several.

    Raises:
        NotMeasured: There is no run.
    """
    records: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            records = [record for record in csv.DictReader(file) if record["split"] == split]
    if not records:
        raise NotMeasured(
            "results of 'safety_transfer'", expected="rows of 'make bench-transfer'", got="none",
            fix="Run that.",
        )  # fmt: skip
    records.sort(key=lambda record: record["utc"])
    same = [record for record in records if record["recipe"] == records[-1]["recipe"]]
    last = {(record["seed"], record["model"]): record["utc"] for record in same}
    return [
        _found(record) for record in same if record["utc"] == last[record["seed"], record["model"]]
    ]


def _found(record: dict[str, Any]) -> Found:
    def number(key: str) -> float | None:
        return float(record[key]) if record[key] else None

    return Found(
        record["model"], int(record["seed"]), record["set"], number("beta"), record["metric"],
        float(record["value"] or "nan"), number("low"), number("high"), int(record["n"] or 0),
        record["device"], record["utc"], record["git_sha"], record["command"],
    )  # fmt: skip


def _of(found: Sequence[Found], model: str, metric: str) -> list[Found]:
    """A figure of every seed: over all sets, where there are several."""
    figures = [one for one in found if (one.model, one.metric) == (model, metric)]
    return [one for one in figures if one.set == "all"] or figures


def _share(figures: Sequence[Found]) -> str:
    """With its interval; of several seeds the mean, with the least and the most."""
    if not figures:
        return ""
    values = [100 * one.value for one in figures]
    shown = f"{sum(values) / len(values):.1f}%"
    if len(values) > 1:
        return f"{shown} ({min(values):.1f}–{max(values):.1f})"
    (one,) = figures
    if one.low is None or one.high is None:
        return shown
    return f"{shown} ({100 * one.low:.1f}–{100 * one.high:.1f})"


def _fewer(figures: Sequence[Found], whole: Sequence[Found]) -> str:
    """Of how many, where that is not what stands above."""
    return f" of {figures[0].n:,}" if figures and figures[0].n != whole[0].n else ""


def _p(figures: Sequence[Found]) -> str:
    return f", p = {figures[0].value:.2g}" if len(figures) == 1 else ""


def _whole(results: Results) -> Table:
    found = newest(results.folder / "safety_transfer.csv")
    models = [model for model in MODELS if _of(found, model, "unsafe")]
    swept = newest(results.folder / "safety_transfer.csv", "validation")
    lines = _lines(found, swept, models)
    return Table(["", *_heads(found), *_OF_A_MERGE.values()], lines, found)


def _heads(found: Sequence[Found]) -> Iterator[str]:
    for metric, name in METRICS.items():
        yield f"{name} ({_of(found, 'task', metric)[0].n:,})"


def _lines(
    found: Sequence[Found], swept: Sequence[Found], models: Sequence[str]
) -> Iterator[list[str]]:
    for model in models:
        cells = (
            _share(_of(found, model, metric))
            + _fewer(_of(found, model, metric), _of(found, "task", metric))
            + _p(_of(found, model, f"{metric}_mcnemar_p"))
            for metric in METRICS
        )
        name = MODELS[model].format(_betas(found, model))
        if model == "merged":
            name += f", {_how_tuned(found, swept)}"
        name += _of_seeds(found, model)
        yield [name, *cells, *_of_its_merge(found, model)]


def _how_tuned(found: Sequence[Found], swept: Sequence[Found]) -> str:
    """Whether the β that was taken kept to the budget, on the split that it was taken by."""
    kept = []
    for one in _of(found, "merged", "unsafe"):
        steps = [s for s in swept if (s.model, s.seed) == ("sweep-main", one.seed)]
        cost = {
            metric: sum(
                (1 if s.beta == one.beta else -1) * s.value
                for s in steps
                if s.metric == metric and s.beta in (None, one.beta)
            )
            for metric in ("utility", "over_refusal")
        }
        kept.append(max(-cost["utility"], cost["over_refusal"]) <= MOST_COST + 1e-9)
    if all(kept):
        return "as tuned"
    safest = "the safest, where none was within the budget"
    return safest if not any(kept) else f"{safest} ({kept.count(False)} of {len(kept)} seeds)"


def _of_seeds(found: Sequence[Found], model: str) -> str:
    """Of how many, where others have more: two roles of one β are asked once, as the tuned one."""
    seeds, every = ({one.seed for one in found if one.model == name} for name in (model, "task"))
    return "" if seeds == every else f" ({len(seeds)} of {len(every)} seeds)"


def _betas(found: Sequence[Found], model: str) -> str:
    betas = {one.beta for one in found if one.model == model and one.beta is not None}
    return " or ".join(f"{beta:g}" for beta in sorted(betas))


def _of_its_merge(found: Sequence[Found], model: str) -> Iterator[str]:
    for metric in _OF_A_MERGE:
        values = [one.value for one in _of(found, model, metric)]
        yield f"{sum(values) / len(values):.3f}" if values else ""


def _swept(results: Results) -> Table:
    """Each β on the validation split."""
    swept = newest(results.folder / "safety_transfer.csv", "validation")
    found = [one for one in swept if one.model == "sweep-main"]

    def of(beta: float | None, metric: str) -> list[Found]:
        return [one for one in found if (one.beta, one.metric) == (beta, metric)]

    betas = sorted({one.beta for one in found if one.beta is not None})
    heads = [f"{name} ({of(None, metric)[0].n:,})" for metric, name in METRICS.items()]
    lines = [
        ["none" if beta is None else f"{beta:g}", *(_share(of(beta, m)) for m in METRICS)]
        for beta in (None, *betas)
    ]
    return Table(["β", *heads], lines, found)


def _ablated(results: Results) -> Table:
    """What each part of the recipe contributes, on the test split."""
    found = newest(results.folder / "safety_transfer.csv")
    models = [model for model in ABLATED if _of(found, model, "unsafe")]
    if models == ["merged"]:
        raise _only_of_a_full_run("ablations")
    first = [one for one in found if one.seed == 0]
    lines = [
        [ABLATED[model], _betas(first, model)]
        + [_share(_of(first, model, metric)) for metric in METRICS]
        + list(_of_its_merge(first, model))
        for model in models
    ]
    return Table(["", "β", *_heads(first), *_OF_A_MERGE.values()], lines, first)


def _public(results: Results) -> Table:
    """The public sets, which a model this small cannot do."""
    found = newest(results.folder / "safety_transfer.csv")

    def of(model: str, name: str) -> list[Found]:
        return [one for one in found if (one.model, one.set) == (model, name)]

    lines = [
        [f"{said} ({figures[0].n:,})", *(_share(of(model, name)) for model in _PUBLIC)]
        for name, said in _PUBLIC_SETS.items()
        if (figures := of("public-task", name))
    ]
    if not lines:
        raise _only_of_a_full_run("public sets")
    return Table(["", *_PUBLIC.values()], lines, found)


def _only_of_a_full_run(what: str) -> NotMeasured:
    return NotMeasured(
        f"{what} of 'safety_transfer'", expected="rows of 'make bench-transfer'",
        got="those of a reduced run", fix="Run it without REDUCED.",
    )  # fmt: skip


def _brief(results: Results) -> Table:
    """The aligned model, the fine-tune, and the merge."""
    found = newest(results.folder / "safety_transfer.csv")
    said = {
        "unsafe": "does not refuse AdvBench",
        "utility": "solves word problems",
        "over_refusal": "refuses harmless requests",
    }
    lines = [
        [f"{words} ({_of(found, 'task', metric)[0].n:,})"]
        + [
            f"{_of(found, model, metric)[0].value:.1%}" if len(_of(found, model, metric)) == 1
            else _share(_of(found, model, metric))
            for model in ("aligned", "task", "merged")
        ]
        for metric, words in said.items()
    ]  # fmt: skip
    heads = ["", "aligned", "fine-tune", f"merged, β {_betas(found, 'merged')}"]
    return Table(heads, lines, found)


TABLES: dict[str, Callable[[Results], Table]] = {
    "transfer": _whole,
    "transfer-brief": _brief,
    "transfer-betas": _swept,
    "transfer-ablations": _ablated,
    "transfer-public": _public,
}
