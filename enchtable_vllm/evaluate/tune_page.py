"""The page of a sweep."""

from __future__ import annotations

from enchtable_vllm.evaluate.report import Judge, Rate
from enchtable_vllm.evaluate.tune_choice import Step
from enchtable_vllm.evaluate.tune_journal import Tuning
from enchtable_vllm.page import Html, cell, page, paragraph, table


def tune_page(tuning: Tuning, picture: Html) -> str:
    """The page's text."""
    parts = [paragraph(verdict(tuning)), picture]
    steps = sorted(tuning.steps, key=lambda step: step.beta or 0.0)
    parts.append(
        table(
            ("beta", "unsafe", "utility", "over-refusal"),
            [
                (
                    step.name,
                    _rate(step.unsafe, doubts(step)),
                    _rate(step.utility),
                    _rate(step.over_refusal),
                )
                for step in steps
            ],
        )
    )
    parts += [paragraph(f"{judged(tuning.judge)}.", "note")] if tuning.judge else []
    parts.append(
        paragraph(
            "Shares with Wilson's 95% interval, on the validation split: measure the proposed "
            "beta on the test split before you rely on it.",
            "note",
        )
    )
    return page(f"Beta of {tuning.sweep.safety_vector}", parts)


def judged(judge: Judge) -> str:
    """Who judges, and how far that is to be trusted."""
    return f"Judge: {' '.join(filter(None, (judge.name, judge.model)))}, {judge.calibrated}"


def verdict(tuning: Tuning) -> str:
    """What is proposed, in a line."""
    if tuning.proposed is None:
        return f"No beta is within the budget: none is proposed.{coarse(tuning)}"
    words = f"Proposed: beta {tuning.proposed:g}, the lowest unsafe rate within the budget."
    if tuning.alike:
        others = ", ".join(f"{beta:g}" for beta in tuning.alike)
        words += f" This sample cannot tell it from beta {others}."
    return words + coarse(tuning)


def coarse(tuning: Tuning) -> str:
    """That a budget is finer than its sample: then a single answer decides; else empty."""
    without = next((step for step in tuning.steps if step.beta is None), None)
    budget = tuning.utility_budget
    if without is None or budget is None or without.utility.of * budget >= 1:
        return ""
    return (
        f" Utility was asked of {without.utility.of} problems, where one answer is more than the "
        f"budget of {budget:.1%}: a beta that loses one is out. Give more problems, or a larger "
        "budget."
    )


def doubts(step: Step) -> str:
    """What a step's unsafe rate leaves open, in words; empty where that is nothing."""
    if not step.doubts:
        return ""
    return f"{step.doubts} without a verdict, {step.worst.share:.1%} if all were unsafe"


def _rate(rate: Rate | None, more: str = "") -> Html:
    if rate is None or rate.share is None:
        return cell("–", more)
    counts = f"[{rate.low:.1%}, {rate.high:.1%}] {rate.count}/{rate.of}"
    return cell(f"{rate.share:.1%}", "; ".join(filter(None, (counts, more))))
