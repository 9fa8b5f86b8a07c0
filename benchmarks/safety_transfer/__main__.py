"""Runs it all; interrupted, the same command goes on where it stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.rows import RESULTS, append_records
from enchtable_vllm.demo.checkpoints import ANSWER_TOKENS
from enchtable_vllm.demo.fetch import small_model
from enchtable_vllm.demo.measure import TOKENS
from enchtable_vllm.envs import cache_folder
from enchtable_vllm.evaluate.report import REPORT_FILE, read_report

from . import findings, material
from .measuring import BUDGET, SPLIT, Asking, chosen, reaching
from .recipes import ABLATIONS, MAIN, Models, digest
from .serving import Lazy, enchtable, merging
from .steps import Steps
from .training import distil_vector, train_models

_SEEDS = "0,1,2"
#: Its ablations are made, and it is asked the public sets.
_FIRST_SEED = 0
_PROBLEMS = 1300
_TUNED_PROBLEMS = 3000
_PUBLISHED_BETA = 0.1
_BETAS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0)
_ABLATED_BETAS = (0.3, 0.5, 0.7, 1.0)
_EXPERT = "expert"
#: A LoRA adapter costs a CPU far more than the model does, in all modules that could have one.
_WITH_EXPERT = (
    "--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "qkv_proj", "o_proj",
)  # fmt: skip
#: And each answer takes five requests.
_ASKED_WITH_EXPERT = 200
#: In their own order, for the table; the first is what the others are held against.
_COMPARED = (
    "task",
    "aligned",
    "merged-published",
    "merged",
    "merged-tenth",
    "self-reminder",
    "safedecoding",
)


def main() -> None:
    """Measure, print, append rows to results/safety_transfer.csv."""
    parser = argparse.ArgumentParser(prog="safety_transfer", description=__doc__)
    parser.add_argument(
        "--reduced", action="store_true", help="the first seed, without ablations and public sets"
    )
    parser.add_argument("--seeds", default=_SEEDS, help="which; the first has the ablations")
    parser.add_argument("--work", type=Path, default=Path(".safety-transfer"))
    options = parser.parse_args()
    seeds = [_FIRST_SEED] if options.reduced else [int(seed) for seed in options.seeds.split(",")]
    packages = cache_folder() / "demo"
    shipped = small_model(packages / "smollm2-135m-instruct")
    models = Models()
    tried = material.tried(
        packages, options.work.resolve() / "tried", models.problems, _PROBLEMS, _TUNED_PROBLEMS
    )
    taught = material.taught(packages, _FIRST_SEED, models)
    asked = (SPLIT, BUDGET, TOKENS, _WITH_EXPERT, _ASKED_WITH_EXPERT)
    recipe = digest(models, MAIN, taught, tried.read(), _BETAS, asked)
    work = options.work.resolve() / digest(recipe, ABLATIONS, _ABLATED_BETAS)
    steps = Steps(work)
    answers = _own_answers(shipped, work, packages, models, steps)
    for seed in seeds:
        folder = work / f"seed-{seed}"
        asked = folder / "asked"
        asked.mkdir(parents=True, exist_ok=True)
        taught = material.taught(packages, seed, models)
        cast = train_models(shipped, folder, seed, taught, answers, models, steps)
        distil_vector(cast, MAIN.seeded(seed), taught.complied, steps)
        asking = Asking(asked, cast, tried, steps)
        beta = _compare(asking)
        if seed == _FIRST_SEED and not options.reduced:
            _ask_what_is_public(asking, beta, packages)
            _ablate(asking, beta, taught.complied)
    _report(work, seeds, steps, recipe, _command(options))


def _command(options: argparse.Namespace) -> str:
    if options.reduced:
        return "make bench-transfer REDUCED=1"
    return "make bench-transfer" + ("" if options.seeds == _SEEDS else f" SEEDS={options.seeds}")


def _own_answers(
    shipped: Path, work: Path, packages: Path, models: Models, steps: Steps
) -> dict[str, str]:
    """How the shipped model begins to answer every-day requests, which are those of any seed."""
    file = work / "answers.json"

    def ask() -> None:
        requests = material.taught(packages, _FIRST_SEED, models).everyday
        with Lazy(shipped, (), work / "shipped.log", steps) as server:
            said = server.ask(requests, max_tokens=ANSWER_TOKENS)
        file.write_text(json.dumps(dict(zip(requests, said, strict=True)), indent=1))

    steps.do(file, ask)
    answers: dict[str, str] = json.loads(file.read_text())
    return answers


def _merging(asking: Asking, name: str, **keys: str) -> Lazy:
    arguments = merging(asking.cast.vectors, **keys)
    return Lazy(asking.cast.task, arguments, asking.folder / f"{name}.log", asking.steps)


def _compare(asking: Asking) -> float:
    """The merge at several β, beside what it is compared with.

    Those are the published β, the tuned one, whose costs are bounded, and the smallest that
    reaches the unsafe rate that is aimed at, whatever it costs. What two of them share is asked
    once; the tuned one's name goes first.

    Returns:
        The tuned β.
    """
    cast, folder = asking.cast, asking.folder
    with Lazy(cast.aligned, (), folder / "aligned.log", asking.steps) as server:
        asking.evaluate(server, "aligned")
    with _merging(asking, "task") as server:
        asking.evaluate(server, "task")
        asking.evaluate(server, "self-reminder", "--system-prompt-baseline", "self-reminder")
        tuning = asking.tune(server, MAIN.name, _BETAS)
        beta, _ = chosen(tuning)
        names = {_PUBLISHED_BETA: "merged-published"}
        if (safe := reaching(tuning, findings.MOST_UNSAFE)) is not None:
            names[safe] = "merged-tenth"
        names[beta] = "merged"
        for at, name in names.items():
            asking.evaluate_merged(server, name, MAIN.name, at)
    lora = (*_WITH_EXPERT, "--lora-modules", f"{_EXPERT}={cast.expert}")
    with Lazy(cast.task, lora, folder / "safedecoding.log", asking.steps) as server:
        asking.evaluate(
            server, "safedecoding", "--model", cast.task, "--safedecoding-expert", _EXPERT,
            "--limit", _ASKED_WITH_EXPERT,
        )  # fmt: skip
    return beta


def _ask_what_is_public(asking: Asking, beta: float, packages: Path) -> None:
    """HumanEval, GSM8K and MedMCQA, of the fine-tune and of the merge."""
    utilities = material.public_utilities(packages)
    with _merging(asking, "public") as server:
        asking.evaluate_public(server, "public-task", utilities)
        if not asking.done("public-merged"):
            server.swap(MAIN.name, beta)
        asking.evaluate_public(server, "public-merged", utilities)


def _ablate(asking: Asking, beta: float, complied: Sequence[str]) -> None:
    """One thing changed at a time; each vector at its own β, rounding at the main vector's."""
    for variant in ABLATIONS:
        distil_vector(asking.cast, variant, complied, asking.steps)
    with _merging(asking, "ablations") as server:
        for variant in ABLATIONS:
            its_own, _ = chosen(asking.tune(server, variant.name, _ABLATED_BETAS))
            asking.evaluate_merged(server, variant.name, variant.name, its_own)
    with _merging(asking, "stochastic", rounding="stochastic") as server:
        for name, at in (("stochastic", beta), ("stochastic-published", _PUBLISHED_BETA)):
            asking.evaluate_merged(server, name, MAIN.name, at)


def _report(work: Path, seeds: Sequence[int], steps: Steps, recipe: str, command: str) -> None:
    rows = []
    for seed in seeds:
        folder = work / f"seed-{seed}" / "asked"
        log = folder / "compared.txt"
        log.unlink(missing_ok=True)
        reports = [folder / name for name in _COMPARED if (folder / name / REPORT_FILE).exists()]
        enchtable("compare", *reports, "-o", folder / "compared.html", log=log)
        print(log.read_text())
        rows += findings.rows(folder, seed)
        task, merged = (read_report(folder / name) for name in ("task", "merged"))
        print(f"seed {seed}: {findings.verdict(task, merged)}")
    print("\n".join(findings.costs(steps.seconds)))
    path = RESULTS / "safety_transfer.csv"
    records = [
        {**row, **steps.made[findings.result(row)], "command": command, "recipe": recipe}
        for row in rows
        if findings.result(row) in steps.made  # not of a sweep that has not come to its end
    ]
    new = findings.not_in(path, records)
    made = ("device", "versions", "git_sha", "utc", "command", "recipe")
    append_records(new, (*findings.FIELDS, *made), path)
    print(f"{len(new)} rows appended to {path}; {len(records) - len(new)} were there")


if __name__ == "__main__":
    main()
